"""Settings that must stand before MLX is imported, and the signals that tests count on."""

import atexit
import os
import shutil
import signal
import tempfile

# On an NVIDIA GPU, and on an Apple one from M5 on, MLX multiplies float32 matrices in TF32 (10 bits of mantissa) unless
# told not to; the reference values are float32's own. Measured on an H100: 2.5e-3 of the logits' deviation with TF32,
# under 2e-4 without.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# A shell without job control starts background jobs with Ctrl-C ignored, and programs that they start inherit that: the
# tests that press Ctrl-C in one would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Names and settings of the account that runs the tests are neither read nor changed.
_own = tempfile.mkdtemp(prefix="runner-tests-")
atexit.register(shutil.rmtree, _own, ignore_errors=True)
os.environ |= {"XDG_DATA_HOME": f"{_own}/data", "XDG_CONFIG_HOME": f"{_own}/config"}
os.environ.pop("RUNNER_MODEL", None)
