"""Rules by path: which layer computes in which format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.errors import InputError
from altgrad_core.formats import UnknownFormatError
from altgrad_core.rules import OPERANDS, Each, Rule, check_honoured, match_rules
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
        (
            lambda: Rule("x", None, "E4M3", granularity=Each("tensor", "channel", "tensor")),
            "so granularity='channel' for them would have no effect; expected 'tensor' in its place, or a format of",
        ),
        (
            lambda: Rule("x", "E4M3", None, rounding=Each("stochastic", "toward_zero", "nearest_even")),
            "does not cast activations, so rounding='stochastic' for them",
        ),
        (lambda: match_rules(["x"], [("x", "E4M3")]), "is no rule; expected a Rule"),
    ],
)
def test_bad_rules_say_what_was_expected(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_an_operand_that_is_not_cast_may_be_passed_over_in_an_option_of_each():
    for nothing in (None, "tensor", PerTensor()):
        assert Rule("x", None, "E4M3", granularity=Each("channel", nothing, "tensor")).spec.weights is None


@pytest.mark.parametrize(
    ("rule", "takes", "said"),
    [
        (Rule("emb", "E4M3", activations="E5M2"), ("weights", "gradients"), "activations='E5M2'"),
        (Rule("emb", None, activations="E5M2"), ("weights", "gradients"), "activations='E5M2'"),
        (Rule("emb", "E4M3", gradients="E5M2"), ("weights", "activations"), "gradients='E5M2'"),
        (Rule("emb", "E4M3", activations=None), ("activations", "gradients"), "weights='E4M3'"),
    ],
)
def test_a_format_for_an_operand_that_no_layer_has_is_refused(rule, takes, said):
    with pytest.raises(InputError, match=rf"the rule 'emb' says {said}, which would have no effect: .* emb \(Table\)"):
        check_honoured(match_rules(["emb"], [rule]), {"emb": ("Table", takes)})


def test_a_rule_for_many_layers_need_not_be_honoured_by_each():
    layers = {"emb": ("Table", ("weights", "gradients")), "up": ("Linear", OPERANDS), "idle": ("Table", ())}
    for rule in (Rule(".*", "E4M3", activations="E5M2"), Rule(".*", None, "E4M3", None), Rule("emb", "E4M3")):
        check_honoured(match_rules(list(layers), [rule]), layers)


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
