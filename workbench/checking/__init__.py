"""`check` and what stands on it: --minimise, --vary, the KL split, the fault suite

`checker` is the check itself, on the reference run that `baseline` keeps; `minimising` and `varying`
are searches over many runs; `fault_suite` asks whether the check finds what it should.
"""
