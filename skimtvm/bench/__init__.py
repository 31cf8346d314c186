"""Benchmarks: networks, single layers, sweeps and memory against other engines on the same machine, in the same run.

``records`` what comes out, ``engines`` who is measured, ``timing`` how; ``networks``, ``layers``, ``sweeps`` and ``memory``
measure; ``markdown`` and ``plots`` show. Nothing here is imported by the compiler or the runtime.
"""
