"""How the operators run: hand-written schedules, one family a file (gather_gemm.py serves every convolution)."""
