"""Rules by path: which layer computes in which format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.errors import InputError
from altgrad_core.formats import UnknownFormatError
from altgrad_core.rules import OPERANDS, Each, Rule, match_rules
from altgrad_core.scaling import PerBlock, PerTensor


def formats_of(rule):
    spec = rule.spec
    return [None if getattr(spec, each) is None else str(getattr(spec, each).format) for each in OPERANDS]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("x", "E4M3"), ["E4M3", "E4M3", "E4M3"]),
        (Rule("x", "E4M3", gradients="E5M2"), ["E4M3", "E4M3", "E5M2"]),
        (Rule("x", "E4M3", "E3M4"), ["E3M4", "E4M3", "E3M4"]),
        (Rule("x", "E4M3", None), [None, "E4M3", None]),
        (Rule("x", "E4M3", None, "E5M2"), [None, "E4M3", "E5M2"]),
        (Rule("x", None, "E4M3"), ["E4M3", None, "E4M3"]),
        (Rule("x", "E4M3", gradients=None), ["E4M3", "E4M3", None]),
    ],
)
def test_a_format_that_is_not_given_is_that_of_the_operand_before(rule, expected):
    assert formats_of(rule) == expected


def test_options_stand_for_all_operands_or_each_has_its_own():
    spec = Rule("x", "E4M3", rounding="toward_zero", granularity=Each("tensor", "block8", PerBlock(4, 0))).spec
    assert {getattr(spec, each).rounding for each in OPERANDS} == {"toward_zero"}
    assert (spec.activations.granularity, spec.weights.granularity, spec.gradients.granularity) == (
        PerTensor(),
        PerBlock(8),
        PerBlock(4, 0),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("(", "E4M3"), r"the rule '\(' is no regular expression"),
        (lambda: Rule("x", "E4M3", rounding="nearest"), "unknown rounding 'nearest'; did you mean 'nearest_even'"),
        (lambda: Rule("x", "E4M3", overflow="clip"), "unknown overflow policy 'clip'"),
        (lambda: Rule("x", "E4M3", granularity="row"), "unknown granularity 'row'"),
        (lambda: Rule("x", "float8_e8m0fnu"), "the rule 'x': float8_e8m0fnu has no sign and no zero"),
        (lambda: Rule("x", "E4M3", gradients="float32"), "the rule 'x': float32 casts nothing; expected None"),
        (lambda: Rule("x", "E4M3", accumulate="exactly"), "did you mean 'exact'"),
        (
            lambda: Rule("x", None, rounding="stochastic"),
            "so rounding='stochastic' would have no effect",
        ),
        (lambda: match_rules(["x"], [("x", "E4M3")]), "is no rule; expected a Rule"),
    ],
)
def test_bad_rules_say_what_was_expected(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_an_unknown_format_is_refused_when_the_rule_is_made():
    with pytest.raises(UnknownFormatError, match="E4M33"):
        Rule("x", "E4M33")


def test_the_first_full_match_counts():
    rules = [Rule("attn/out", None), Rule("attn", "E5M2"), Rule("attn/.*", "E4M3"), Rule(".*", "E3M4")]
    found = match_rules(["attn/out", "attn/q", "mlp", "xattn/q"], rules)
    assert [found.rules[path] for path in found.rules] == [rules[0], rules[2], rules[3], rules[3]]
    assert found.unused == (rules[1],)
    assert match_rules(["mlp"], [Rule("attn", None)]).rules["mlp"] is None


@given(st.lists(st.sampled_from(["blocks", "0", "1", "attn", "q", "up"]), min_size=1, max_size=4))
def test_one_list_of_rules_serves_paths_with_slashes_and_with_dots(parts):
    rules = [Rule("blocks/0/.*", "E4M3"), Rule(".*/attn", "E5M2"), Rule("blocks/[01]", None)]
    slashed, dotted = "/".join(parts), ".".join(parts)
    assert match_rules([slashed], rules).rules[slashed] is match_rules([dotted], rules).rules[dotted]
