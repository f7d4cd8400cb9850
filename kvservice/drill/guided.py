"""One target of the fuzzer, fed by atheris (libFuzzer), which sees each branch and comparison of the parser's code.

Run as a process of its own: `python -m kvservice.drill.guided TARGET CORPUS INPUTS SEED`. libFuzzer ends the process
when it is through, with a code that isn't 0 if a parser raised; the input lies beside the corpus then. Inputs that
reach something new are added to the corpus, where `kvservice fuzz --corpus` finds them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

INSTRUMENTED = ("kvservice.tier", "kvservice.store", "kvservice.gateway", "kvservice.worker", "kvservice.config")
SLOW_S = 20
MAX_INPUT_BYTES = 1 << 16


def main() -> None:
    """Doesn't return."""
    name, corpus, inputs, seed = sys.argv[1:]
    with atheris.instrument_imports(include=[*INSTRUMENTED, "kvservice.compression", "kvservice.models.tokenizer"]):
        from kvservice.drill.fuzz_targets import targets
    folder = Path(corpus) / name
    folder.mkdir(parents=True, exist_ok=True)
    # Not removed: libFuzzer ends the process itself.
    target = next(each for each in targets(Path(tempfile.mkdtemp(prefix="kvservice-fuzz-"))) if each.name == name)
    for index, data in enumerate(target.seeds):
        (folder / f"seed-{index}").write_bytes(data)
        # What is loaded on first use must not count as a slow input.
        target.feed(data)

    def feed(data: bytes) -> None:
        target.feed(target.mend(data) if target.mend is not None else data)

    limits = [f"-runs={inputs}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={SLOW_S}"]
    atheris.Setup([name, *limits, f"-artifact_prefix={folder}/finding-", str(folder)], feed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
