"""Known bugs as implementations of ops, to be switched on like any route: `*/hc_post=fault/comb_transposed`

`base` has the decorator and the table, one module a family has the faults, `catalogue` imports
them all. Nothing here is loaded until a route names a fault.
"""
