"""How long a server's answer may take: many processes may share the machine, and on an NVIDIA GPU its kernels."""

from __future__ import annotations

import httpx2

# One object, the default of every call; 5 seconds were too few for a completion beside 30 other processes on two H200s.
httpx2.post.__kwdefaults__["timeout"].read = 60.0
