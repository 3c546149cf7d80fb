"""Programs that write to a tracker, one in each file; see `eqx_q.tracking.worker`.

They are run in a process of their own, which has to start fast: they import nothing of eqx_q. What
they need they import where it is used, as modules whose types are not known: it may be missing.
"""
