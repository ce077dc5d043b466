"""A run's page at Weights & Biases: online where somebody is logged in, else offline in the run's folder.

`WANDB_MODE` and wandb's other variables are respected. A resumed run goes on with its own page, whose
id lies in the run's folder.
"""

import logging
import netrc
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)
SERVER = "https://api.wandb.ai"


@dataclass(frozen=True)
class WandbOptions:
    """Where a page lies and how it is found; `export` uploads the run's export at its end."""

    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    export: bool = False

    def given(self) -> dict[str, Any]:
        """What was set, as `wandb.init` calls it: the rest is left to wandb's variables."""
        all_of_them = {
            "entity": self.entity,
            "group": self.group,
            "tags": list(self.tags),
            "notes": self.notes,
        }
        return {name: value for name, value in all_of_them.items() if value}


def is_online() -> bool:
    """Whether a page is sent: as WANDB_MODE says, else where a key or a login in a netrc is found."""
    said = os.environ.get("WANDB_MODE")
    if said:
        return said not in ("offline", "dryrun")
    if os.environ.get("WANDB_API_KEY"):
        return True
    # `wandb login` writes a key for the server into a netrc file.
    host = urlparse(os.environ.get("WANDB_BASE_URL") or SERVER).netloc
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False


class WandbPage(WandbLogger):
    """Makes its page when training begins, not when a trainer is set up: a refused run makes none."""

    def __init__(self, has_begun: Callable[[], bool], **options: Any) -> None:
        online = is_online()
        super().__init__(**options, offline=not online and "WANDB_MODE" not in os.environ)
        self._has_begun = has_begun
        if not online:
            log.info(
                "wandb: the page lies offline in %s; `wandb login` sends those of later runs, "
                "`wandb sync` this one",
                options.get("save_dir"),
            )

    @property
    def experiment(self) -> Any:
        if not self._has_begun() and rank_zero_only.rank == 0:
            return _DummyExperiment()  # takes whatever it is given, and Lightning asks for it early
        return super().experiment

    @rank_zero_only
    def send_export(self, folder: Path) -> None:
        """The run's export as an artifact of its page."""
        import wandb

        name = re.sub(r"[^\w.-]", "-", str(self.name))
        artifact = wandb.Artifact(name, type="model")
        artifact.add_dir(str(folder))
        self.experiment.log_artifact(artifact)
