"""Published recipes: what a recording says of a run (`recipe.json`), what a YAML of ours says, and
where they differ.

Both become flat lists of facts, `optimizer.lr` or `schedule.factor.50` to a value. A recorded fact
is compared with the fact of the same name of ours; where it is words, STATEMENTS says which
settings they mean. Facts that need the built model (dropouts, losses) are added by the caller. What
has no fact of ours, equals none and is not listed as meant is a mismatch: nothing is left out
silently.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tessellar.data.crops import Resize
from tessellar.data.framing import Framing
from tessellar.schedules import Schedule
from tessellar.training.optim import OptimizerSettings

IMAGES = 1_281_167  # of ImageNet's training set
PROCESSES = 8  # that the batch sizes of configs/imagenet256 are meant for
# Of the run, where a recording has the schedule's factor.
PERCENTS = (
    0,
    5,
    10,
    25,
    50,
    75,
    90,
    99.9,
)
CLASSES = {"adamw": "AdamW", "adam": "Adam", "muon": "Muon"}
EMA_WARMUP = "min(decay, (1 + t) / (10 + t))"

Facts = dict[str, Any]

# What recorded words mean in settings: the fact's name (of any recording), its words, our facts.
STATEMENTS: dict[str, dict[str, Facts]] = {
    "augmentation.crop": {
        "ADM centre crop 256": {"framing.crop": "adm", "framing.size": 256, "framing.resize": None},
        "ADM centre crop 512": {"framing.crop": "adm", "framing.size": 512, "framing.resize": None},
        "ADM random crop 336": {
            "framing.crop": "random",
            "framing.size": 336,
            "framing.resize": None,
        },
        "ADM random crop 336: shorter side to a random integer of [336, 420]": {
            "framing.crop": "random",
            "framing.size": 336,
            "framing.resize": None,
        },
        "ADM random crop: shorter side to a random integer of [256, 320]": {
            "framing.crop": "random",
            "framing.size": 256,
            "framing.resize": None,
        },
        "ADM random crop: shorter side to a random integer of [256, 320], random position": {
            "framing.crop": "random",
            "framing.size": 256,
            "framing.resize": None,
        },
        "ADM random crop (shorter side in [256, 320]); probability of the random crop 1 to epoch 700, "
        "linear to 0 at 750, then centre crop": {
            "framing.crop": "random",
            "framing.size": 256,
            "framing.resize": None,
            "framing.centring": (700, 750),
        },
        "random crop 0.8-1.0": {"framing.crop": "random", "framing.resize": None},
        "centre 256": {"framing.crop": "center", "framing.size": 256},
        "random": {"framing.crop": "random"},
        "random 256": {"framing.crop": "random", "framing.size": 256},
        "random 256, no zoom": {"framing.crop": "random", "framing.size": 256},
        "random 512": {"framing.crop": "random", "framing.size": 512},
    },
    "augmentation.resize": {
        "shorter side 256, bicubic, antialias": {"framing.resize": Resize(1.0, "bicubic")},
        "shorter side 256, bilinear, antialias": {"framing.resize": Resize(1.0, "bilinear")},
        "shorter side 256, torchvision default bilinear (antialias default)": {
            "framing.resize": Resize(1.0, "bilinear")
        },
        "shorter side 288 (1.125 * 256), Lanczos": {"framing.resize": Resize(1.125, "lanczos")},
        "shorter side 576 (1.125 * 512), Lanczos": {"framing.resize": Resize(1.125, "lanczos")},
    },
    "augmentation.filter": {"box halving, then bicubic": {"framing.resize": None}},
    "augmentation.flip": {
        "part of the ten crops": {"framing.crop": "ten", "framing.flip": False},
        "0.5": {"framing.flip": True},
        "0.5, also after epoch 750": {"framing.flip": True},
        "0.0": {"framing.flip": False},
    },
    "augmentation.ten_crop": {
        "ten crops of ADM centre crops to int(1.05 * 256) and int(1.1 * 256), drawn with replacement": {
            "framing.crop": "ten",
            "framing.size": 256,
            "framing.ten_ratios": (1.05, 1.1),
        },
        "ADM centre crop int(1.1 * 256) = 281, TenCrop(256), one of 10 drawn a visit": {
            "framing.crop": "ten",
            "framing.size": 256,
            "framing.ten_ratios": (1.1,),
        },
    },
    "augmentation.ten_crop.resize_crop": {
        "ADM centre crop to int(1.1 * size)": {"framing.crop": "ten", "framing.ten_ratios": (1.1,)}
    },
    "augmentation.ten_crop.crops": {
        "TenCrop(size): 4 corners + centre, each also mirrored": {"framing.crop": "ten"}
    },
    "augmentation.ten_crop.drawn": {"one of 10 a visit, uniform": {"framing.crop": "ten"}},
    "augmentation.pretokenization": {
        "scripts/pretokenization.py: --ten_crop, ADM centre crop int(1.1 * 256), TenCrop(256); "
        "one of 10 drawn a visit": {
            "framing.crop": "ten",
            "framing.size": 256,
            "framing.ten_ratios": (1.1,),
        },
    },
    "epochs": {"counted in updates": {}},
    "dropout.attention": {"0.1 in the arguments, never applied": {"dropout.attention": 0.0}},
    "trained": {"decoder, pixel_decoder, pixel_quantize": {"trained": ["decoder", "pixels"]}},
    "tail_drop.kept": {
        "U{1..256}, one draw a forward pass and process": {
            "tail_drop.shortest": 1,
            "tail_drop.longest": 256,
        }
    },
    "augment.kind": {
        "DiffAugment in [0, 1], order colour, translation, cutout 0.2, each with probability 0.5, "
        "real and fake drawn independently": {
            "augment.unit_range": True,
            "augment.order": ["colour", "translation", "cutout"],
            "augment.cutout": 0.2,
            "augment.probability": 0.5,
        },
        "DiffAug prob 1, cutout 0.2, blur fading over 4 % of the run": {
            "augment.unit_range": False,
            "augment.order": ["translation", "colour", "cutout"],
            "augment.cutout": 0.2,
            "augment.probability": 1.0,
            "share.blur": 0.04,
        },
    },
    "losses.auxiliary strip.weight": {"10 * 17 / 256": {"losses.prefix.weight": 10 * 17 / 256}},
    "losses.lpips.weight": {
        "1.0 in the first phase, then 0": {"losses.lpips.weight": 1.0},
    },
    "losses.perceptual.weight": {
        "0.1 in the first phase, then 1.0": {"losses.perceptual.weight": 0.1},
    },
    "losses.adversarial.start": {
        "20 % of the run (arg_util.py: ep * 0.2; its comment says 0.22)": {"share.start": 0.2},
    },
    "losses.adversarial.warmup": {
        "linear over 2 % of the run from its start": {"share.warmup": 0.02}
    },
    "losses.hinge.start": {"20 % of the run": {"share.start": 0.2}},
    "losses.adversarial.adaptive.ratio": {
        "|grad nll| / (|grad g| + 1e-4) at decoder.conv_out.weight, nll summed": {
            "adaptive.eps": 1e-4,
            "adaptive.summed": True,
        },
        "|grad (rec + lpips)| / (|grad g| + 1e-6) at decoder.conv_out.weight": {
            "adaptive.eps": 1e-6,
            "adaptive.summed": False,
        },
    },
    "precision": {
        words: {"precision": "bf16-mixed"}
        for words in (
            "bf16",
            "bf16 autocast",
            "bf16 autocast, fp32 weights",
            "bf16 autocast, head target in fp32",
            "bf16 (accelerate)",
            "bf16 (accelerate), TF32",
            "bf16 (accelerate), TF32; losses outside of autocast",
            "script PRECISION default fp16; train_c2i.py default bf16",
        )
    },
}

# Facts of a recording that are compared in another place, or that explain another fact.
ELSEWHERE: dict[str, str] = {
    "variant": "a name",
    "note": "a remark",
    "*.note": "a remark",
    "*_note": "a remark",
    "null_decay": "a remark",
    "decay.*": "tests/interop/test_weight_decay.py, name by name",
    "init.*": "tests/recipes/test_initial_weights.py, kind by kind",
    "init_args.*": "options of the official initialisation, whose outcome is compared",
    "schedule.kind": "in words what schedule.factor.* says in numbers",
    "schedule.executed": "where the factors are from",
    "schedule.paper": "what the paper says otherwise: the YAML's header names the one that it follows",
    "schedule.wpe": "the last factor: schedule.factor.99.9",
    "schedule.updates_per_epoch": "follows from the batch and the number of images",
    "schedule.updates_known": "whether the length of the run is published",
    "schedule.warmup_epochs": "schedule.warmup_updates",
    "weight_decay_schedule.kind": "in words what its numbers say",
    "losses.*.name": "a name",
    "losses.*.kind": "the loss itself: replays of the recordings (convert.py verify)",
    "losses.*.reduction": "the loss itself: replays of the recordings (convert.py verify)",
    "losses.*.mask_ratio": "the law of MaskGIT's masks: tests/recipes/test_laws.py",
    "masking.ratio": "the law of MAR's masks: tests/recipes/test_laws.py",
    "order.kind": "RAR's orders: tests/models/test_rar.py",
    "order.between": "the fall of order.r is linear: tests/models/test_rar.py",
    "ema.parameters_only": "the models have no buffers that training moves",
    "augmentation.latents": "training draws from the posterior: tests/training/test_continuous.py",
    "schedule.clock": "a discriminator's schedule runs on its own clock where its YAML says `discriminator_schedule`",
    "schedule.lr_end_nominal": "where the decay would end, were it finished: schedule.factor.99.9 says where it does",
    "schedule.processes": "schedule.factor.* is of that number",
    "schedule.factor_if_8_processes.*": "another reading of the same run: a note says why it is unresolved",
    "other": "a remark",
    "phases": "runs that go on from each other: commands in the YAML's header",
    "schedule.published_at": "the update whose weights are published: the YAML's header",
    "losses.proxy_cross_entropy.target": "tests/tokenizers/test_titok.py",
    "losses.nll.logvar": "a constant 0",
    "losses.kl.logvar_init": "a constant 0",
    "losses.adversarial.adaptive.times": "the weight of the adversarial loss",
    "tail_drop.stages": "the same class trains both",
    "dropout.nested.applied": "tests/tokenizers/test_restok.py",
    "perturbation.*": "flips of bits by size: tests/models/test_bitdance.py",
    "augment.fill": "0 of images in [0, 1]: augment.unit_range",
    "augmentation.range": "the range of the official tokenizer's input: ours takes [-1, 1] and maps it inside",
    "augmentation.codes": "whether codes are extracted before: a cache or not, as the user likes (docs/training.md)",
}


@dataclass(frozen=True)
class Recipe:
    """A YAML of configs/, read without building the model."""

    name: str
    config: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        return self.config["model"]["init_args"]

    @property
    def data(self) -> Mapping[str, Any]:
        return self.config["data"]["init_args"]

    @property
    def updates(self) -> int:
        return self.config["trainer"]["max_steps"]

    @property
    def global_batch(self) -> int:
        return self.data["batch_size"] * PROCESSES * self.model.get("accumulate", 1)

    @property
    def framing(self) -> Framing:
        resize = self.data.get("resize")
        centring = self.data.get("centring")
        return Framing(
            size=self.data["size"],
            crop=self.data.get("crop", "adm"),
            flip=self.data.get("flip", True),
            ten_ratios=tuple(self.data.get("ten_ratios", (1.1,))),
            resize=None if resize is None else Resize(**resize),
            centring=None if centring is None else tuple(centring),
        )

    @property
    def ema(self) -> tuple[float, bool] | None:
        """Decay of the averaged weights and whether it warms up; None without an average."""
        if self.config.get("ema") is not None:
            return self.config["ema"], True
        for callback in self.config["trainer"].get("callbacks", ()):
            if callback["class_path"].endswith(".EMA"):
                options = callback.get("init_args", {})
                return options.get("decay", 0.9999), options.get("warmup", True)
        return None

    def optimizer(self, key: str = "optimizer") -> OptimizerSettings:
        return OptimizerSettings(**self.model.get(key, {}))

    def schedule(self, key: str = "schedule") -> Schedule:
        return Schedule(**self.model.get(key, {}))


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file."""
    return Recipe(path.stem, yaml.safe_load(path.read_text()))


def facts_of(recipe: Recipe) -> Facts:
    """Facts of what is trained first: optimizer, schedule, average, batch, and how images are
    framed.
    """
    return {
        **optimizer_facts(recipe.optimizer(), recipe.global_batch),
        **schedule_facts(recipe.schedule(), recipe.optimizer(), recipe.updates),
        **ema_facts(recipe),
        **framing_facts(recipe.framing),
        "grad_clip": recipe.model.get("clip", 1.0) or "none",
        "global_batch": recipe.global_batch,
        "epochs": recipe.updates * recipe.global_batch / IMAGES,
        "precision": recipe.config["trainer"]["precision"],
    }


def optimizer_facts(settings: OptimizerSettings, batch: int) -> Facts:
    """What an optimizer is made of; its peak rate is that of the whole batch."""
    return {
        "optimizer.name": CLASSES[settings.name],
        "optimizer.lr": settings.lr,
        "optimizer.lr_for_batch": batch,
        "optimizer.betas": list(settings.betas),
        "optimizer.eps": settings.eps,
        "optimizer.weight_decay": settings.weight_decay,
        "optimizer.encoder_rate": settings.encoder_rate,
    }


def schedule_facts(schedule: Schedule, settings: OptimizerSettings, updates: int) -> Facts:
    """Factors of the peak rate along the run, and the weight decay where it has a schedule."""
    at = {percent: math.floor(percent / 100 * updates) for percent in PERCENTS}
    facts: Facts = {}
    for percent, step in at.items():
        facts[f"schedule.factor.{percent}"] = schedule.factor(step, updates)
    facts |= {
        "schedule.updates": updates,
        "schedule.warmup_updates": schedule.warmup,
        "schedule.factor_warmup_end": schedule.factor(schedule.warmup, updates),
        "schedule.lr_end": settings.lr * schedule.factor(updates, updates),
    }
    if schedule.final_weight_decay is None:
        return facts | {"weight_decay_schedule": "none"}
    decay = settings.weight_decay
    for percent, step in at.items():
        value = schedule.weight_decay(decay, step, updates)
        facts[f"weight_decay_schedule.weight_decay.{percent}"] = value
    return facts


def ema_facts(recipe: Recipe) -> Facts:
    if recipe.ema is None:
        return {"ema": "none"}
    decay, warmup = recipe.ema
    words = EMA_WARMUP if warmup else "none"
    return {"ema.decay": decay, "ema.warmup": words, "ema.evaluated": True}


def framing_facts(framing: Framing) -> Facts:
    names = ("crop", "size", "flip", "ten_ratios", "resize", "centring")
    return {f"framing.{name}": getattr(framing, name) for name in names}


def recorded_facts(part: Mapping[str, Any]) -> Facts:
    """The facts of one part of a `recipe.json` that it states; losses are named, null values left
    out.
    """
    return {name: value for name, value in _flat(part, "") if value is not None}


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for part in value:
            yield from _flat(part, f"{name}.{part['name']}")
    else:
        yield name, value


class Mismatch(NamedTuple):
    """A recorded fact that ours does not equal."""

    name: str
    recorded: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.name}: recorded {self.recorded!r}, ours {self.ours!r}"


def compare(
    recorded: Facts, ours: Facts, elsewhere: Mapping[str, str] = ELSEWHERE
) -> list[Mismatch]:
    """The recorded facts that ours do not equal, or have nothing to be compared with."""
    found = []
    for name, value in recorded.items():
        if any(fnmatchcase(name, pattern) for pattern in elsewhere):
            continue
        for own_name, wanted in _wanted(name, value).items():
            own = ours.get(own_name, "nothing")
            if not _equal(name, wanted, own):
                found.append(Mismatch(name, value, own))
                break
    return found


def _wanted(name: str, value: Any) -> Facts:
    """What of ours has to hold for a recorded fact: what its words mean, or the same fact with the
    same value.
    """
    return STATEMENTS.get(name, {}).get(str(value), {name: value})


def _equal(name: str, recorded: Any, ours: Any) -> bool:
    if (
        isinstance(recorded, bool)
        or isinstance(ours, bool)
        or not isinstance(recorded, (int, float))
    ):
        return _plain(recorded) == _plain(ours)
    if not isinstance(ours, (int, float)):
        return False
    if name == "epochs":  # official loaders drop the last, incomplete batch of an epoch
        return math.isclose(recorded, ours, rel_tol=2e-3)
    return math.isclose(recorded, ours, rel_tol=1e-5, abs_tol=1e-4 if "factor" in name else 1e-12)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Entry:
    """Which recorded parts a YAML is the recipe of, and with which sampling its result is quoted.

    `parts`: our side (generator, tokenizer, discriminator) to the part of the recording. `result`:
    in words.
    """

    config: str
    system: str
    parts: Mapping[str, str]
    result: str = ""


@dataclass(frozen=True)
class Difference:
    """A difference that is meant: where (patterns of YAMLs), of which side, which fact, and why."""

    configs: tuple[str, ...]
    side: str
    fact: str
    reason: str

    def concerns(self, config: str, side: str) -> bool:
        here = any(fnmatchcase(config, pattern) for pattern in self.configs)
        return here and fnmatchcase(side, self.side)

    def covers(self, config: str, side: str, fact: str) -> bool:
        return self.concerns(config, side) and fnmatchcase(fact, self.fact)


def read_entries(path: Path) -> list[Entry]:
    """The list of recipes of a YAML file."""
    listed = yaml.safe_load(path.read_text())
    return [Entry(config, **facts) for config, facts in listed.items()]


def read_differences(path: Path) -> list[Difference]:
    """The meant differences of a YAML file."""
    listed = yaml.safe_load(path.read_text())
    return [Difference(tuple(entry.pop("configs")), **entry) for entry in listed]


def read_recorded(folder: Path, system: str) -> dict[str, Any]:
    """The recipe recording of a system."""
    return json.loads((folder / system / "recipe.json").read_text())
