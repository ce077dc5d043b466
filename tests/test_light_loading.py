"""Loading a model needs neither the training stack nor what only draws, logs or measures."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPORTS = ROOT / "tests" / "data_of_versions" / "v0.1" / "exports"
LOAD_EVERYTHING = """
import sys
from pathlib import Path

for name in ("wandb", "matplotlib", "webdataset", "torch_fidelity", "scipy", "lightning", "torchmetrics", "datasets"):
    sys.modules[name] = None  # an import of it fails
import tessellar

folders = sorted(Path(sys.argv[1]).glob("*/config.yaml"))
for config in folders[::3]:
    if "kind: discriminator" not in config.read_text():
        tessellar.load(config.parent)
print(len(folders[::3]))
"""


def test_models_load_without_loggers_plots_and_the_training_stack():
    command = [sys.executable, "-c", LOAD_EVERYTHING, str(EXPORTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 20
