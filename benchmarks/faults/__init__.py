"""The fault matrix: what each fault costs a run, with and without the interventions, against an undisturbed twin."""
