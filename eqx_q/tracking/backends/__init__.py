"""One file for each tracker, with the class `Run` of `eqx_q.tracking.worker`.

The files run in the tracker's process. They do not import eqx_q, so that the process starts fast.
They import the tracker's package when a run is opened, since it may be missing; it has type `Any`.
"""
