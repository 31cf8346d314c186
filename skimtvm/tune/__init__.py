"""Tuning: search for better knobs of each kernel on a machine, and keep what was measured.

``log`` is the record format and its files, ``tasks`` finds the layers of a network that are worth tuning, ``worker``
builds and times kernels in a process of its own, ``measure`` drives workers here or through TVM's RPC tracker, ``search``
proposes knobs, ``session`` puts them together, ``lookup`` is the compiler's view of a log.

What TVM's MetaSchedule gives and what is used of it. A kernel here is a template with Python parameters, not a schedule
with sampled decisions: accumulators, data-dependent bounds and fused epilogues have no form that schedule primitives keep
in registers. So there is no trace for MetaSchedule's space generators, mutators and ``XGBModel`` features to work on (and
its postprocessor ``DisallowDynamicLoop`` rejects every loop whose extent is data). ``LocalBuilder`` and ``LocalRunner``
time one candidate after the other, each in a fresh process with its own arguments: drift of the machine would count as
speed, and they start at about a second a trial, where compiling and timing one kernel takes a tenth. ``JSONDatabase``
finds a workload by the structure of its code, which is the same for two layers of different sparsity. What remains is
XGBoost itself, with features of the sparse matrix, and TVM's RPC tracker, server and session for other machines.
"""
