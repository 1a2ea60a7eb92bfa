"""What `scripts/check_cuda` prints: registers and bytes of every kernel, for the architectures that are named."""

from __future__ import annotations

import sys

from cuda_sources import sources, used

from runner.errors import BackendError
from runner.ops.cuda.nvrtc import ARCHITECTURES, Nvrtc


def main() -> int:
    """Compile all, print a line for each, and say by the exit status whether all of them compile."""
    architectures = sys.argv[1:] or ARCHITECTURES
    if unknown := set(architectures) - set(ARCHITECTURES):
        print(f"check_cuda: {', '.join(sorted(unknown))}: it must be of {', '.join(ARCHITECTURES)}", file=sys.stderr)
        return 2
    nvrtc, failed = Nvrtc(), 0
    print(f"NVRTC {nvrtc.version}: kernel, registers, bytes spilled if any, bytes of shared memory it has itself")
    for architecture in architectures:
        for name, source in sources(architecture).items():
            try:
                code, log = nvrtc.compile(source(), architecture)
            except BackendError as error:
                failed += 1
                print(f"{architecture}  {name}: {error}")
                continue
            kernels = ", ".join(
                f"{one.name} {one.registers}"
                + (f" (spills {one.spilled})" if one.spilled else "")
                + (f" {one.static_memory} B" if one.static_memory else "")
                for one in used(log)
            )
            print(f"{architecture}  {name} ({len(code) >> 10} KB): {kernels}", flush=True)
    print(f"{failed} do not compile" if failed else "all compile")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
