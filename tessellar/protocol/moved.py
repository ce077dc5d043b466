"""Names that moved: classes, constructor arguments and tensors in files of older versions, and what
they are now.

Exports, checkpoints and headers of caches hold such names. One is written here once and never taken
out: files live longer than trees.
"""

from typing import Any

from tessellar.errors import UserError

MOVED: dict[str, str] = {
    "tessellar.callbacks.order_annealing.OrderAnnealing": "tessellar.training.methods.order_annealing.OrderAnnealing",
    "tessellar.data.cached_tokens.CachedTokensData": "tessellar.data.token_cache.cached_tokens.CachedTokensData",
    "tessellar.data.datamodule.FashionMNISTData": "tessellar.data.sets.fashion_mnist.FashionMNISTData",
    "tessellar.data.datamodule.ImageFolderData": "tessellar.data.sets.image_folder.ImageFolderData",
    "tessellar.data.datamodule.ShapesData": "tessellar.data.sets.shapes.ShapesData",
    "tessellar.data.hf_dataset.HFData": "tessellar.data.sets.hf_dataset.HFData",
    "tessellar.data.webdataset_stream.WebDatasetStreamData": "tessellar.data.tars.webdataset_stream.WebDatasetStreamData",
    "tessellar.data.webdataset_tar.WebDatasetData": "tessellar.data.tars.webdataset_tar.WebDatasetData",
    "tessellar.flow.Times": "tessellar.processes.flow.Times",
    "tessellar.models.conditioners.CaptionConditioner": "tessellar.text.conditioners.CaptionConditioner",
    "tessellar.models.conditioners.ClassConditioner": "tessellar.protocol.conditioner.ClassConditioner",
    "tessellar.protocol.conditioner.ClassConditioner": "tessellar.protocol.condition.ClassConditioner",
    "tessellar.models.conditioners.EncoderConditioner": "tessellar.text.conditioners.EncoderConditioner",
    "tessellar.models.conditioners.FeatureConditioner": "tessellar.text.conditioners.FeatureConditioner",
    "tessellar.models.entities.Entities": "tessellar.protocol.entities.Entities",
    "tessellar.models.flextok_ar.FlexAR": "tessellar.models.flextok.FlexAR",
    "tessellar.models.hita_ar.HitaAR": "tessellar.models.hita.HitaAR",
    "tessellar.models.retok_gpt.ReToKGPT": "tessellar.models.retok.ReToKGPT",
    "tessellar.models.toy.TableGenerator": "tessellar.parity.table_generator.TableGenerator",
    "tessellar.sampling.apg.APG": "tessellar.processes.apg.APG",
    "tessellar.sampling.choice.Choice": "tessellar.protocol.choice.Choice",
    "tessellar.sampling.diffusion.AncestralDiffusion": "tessellar.processes.diffusion.AncestralDiffusion",
    "tessellar.sampling.flow.Flow": "tessellar.processes.flow.Flow",
    "tessellar.sampling.guidance.Constant": "tessellar.protocol.guidance.Constant",
    "tessellar.sampling.guidance.Cosine": "tessellar.protocol.guidance.Cosine",
    "tessellar.sampling.guidance.Guidance": "tessellar.protocol.guidance.Guidance",
    "tessellar.sampling.guidance.HalfCosine": "tessellar.protocol.guidance.HalfCosine",
    "tessellar.sampling.guidance.HalfLinear": "tessellar.protocol.guidance.HalfLinear",
    "tessellar.sampling.guidance.Interval": "tessellar.protocol.guidance.Interval",
    "tessellar.sampling.guidance.LateStep": "tessellar.protocol.guidance.LateStep",
    "tessellar.sampling.guidance.Linear": "tessellar.protocol.guidance.Linear",
    "tessellar.sampling.guidance.PowerCosine": "tessellar.protocol.guidance.PowerCosine",
    "tessellar.sampling.guidance.Revealed": "tessellar.protocol.guidance.Revealed",
    "tessellar.sampling.guidance.Step": "tessellar.protocol.guidance.Step",
    "tessellar.tokenizers.flextok_transformer.Grid": "tessellar.tokenizers.flextok.Grid",
    "tessellar.tokenizers.flextok_transformer.TransformerSize": "tessellar.tokenizers.flextok.TransformerSize",
    "tessellar.tokenizers.flow_decoding.FlowDecoding": "tessellar.tokenizers.flextok.FlowDecoding",
    "tessellar.tokenizers.flow_decoding.FlowTraining": "tessellar.tokenizers.flextok.FlowTraining",
    "tessellar.tokenizers.hita_vision.HitaVision": "tessellar.tokenizers.hita.HitaVision",
    "tessellar.tokenizers.layout.Bits": "tessellar.protocol.layout.Bits",
    "tessellar.tokenizers.layout.Categorical": "tessellar.protocol.layout.Categorical",
    "tessellar.tokenizers.layout.Continuous": "tessellar.protocol.layout.Continuous",
    "tessellar.tokenizers.layout.Factorized": "tessellar.protocol.layout.Factorized",
    "tessellar.tokenizers.layout.Layout": "tessellar.protocol.layout.Layout",
    "tessellar.tokenizers.layout.Segment": "tessellar.protocol.layout.Segment",
    "tessellar.tokenizers.llamagen_vq.LlamaGenVQ": "tessellar.tokenizers.llamagen.LlamaGenVQ",
    "tessellar.tokenizers.quantizers.multi_scale.MultiScaleQuantizer": "tessellar.tokenizers.var.MultiScaleQuantizer",
    "tessellar.tokenizers.quantizers.multi_scale.Phi": "tessellar.tokenizers.var.Phi",
    "tessellar.tokenizers.retok_qformer.QFormerSize": "tessellar.tokenizers.retok.QFormerSize",
    "tessellar.tokenizers.var_vqvae.VARVQVAE": "tessellar.tokenizers.var.VARVQVAE",
    "tessellar.training.context_noise.ContextNoise": "tessellar.training.methods.context_noise.ContextNoise",
    "tessellar.training.recovery.Recovery": "tessellar.training.methods.recovery.Recovery",
    "tessellar.vision.Preprocessing": "tessellar.networks.vision.Preprocessing",
    "tessellar.vision.Teacher": "tessellar.networks.vision.Teacher",
    "tessellar.vision.VisionModel": "tessellar.networks.vision.VisionModel",
}
"""Former class path: the public path of today."""

ARGUMENTS: dict[str, dict[str, str | None]] = {}
"""Public class path of today: former constructor argument: its name of today, None where it means nothing any more."""

TENSORS: dict[str, dict[str, str]] = {
    "tessellar.models.flextok.FlexAR": {
        "empty": "conditioning.empty",
        "empty_valid": "conditioning.empty_valid",
    },
    "tessellar.models.mar.MAR": {
        "class_embedding": "backbone.class_embedding",
        "null_embedding": "backbone.null_embedding",
        "input": "backbone.input",
        "input_norm": "backbone.input_norm",
        "encoder_positions": "backbone.encoder_positions",
        "encoder_blocks": "backbone.encoder_blocks",
        "encoder_norm": "backbone.encoder_norm",
        "decoder_input": "backbone.decoder_input",
        "mask_token": "backbone.mask_token",
        "decoder_positions": "backbone.decoder_positions",
        "decoder_blocks": "backbone.decoder_blocks",
        "decoder_norm": "backbone.decoder_norm",
        "z_positions": "backbone.z_positions",
    },
}
"""Public class path of today: former name of a tensor or a sub-module, within that class: its name of today."""


def current_path(path: str) -> str:
    """The class path of today, of one from any version."""
    while path in MOVED:
        path = MOVED[path]
    return path


def first_path(path: str) -> str:
    """The first class path that a class of today had: it never changes."""
    former = {new: old for old, new in reversed(MOVED.items())}
    while path in former:
        path = former[path]
    return path


def current_arguments(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments by their names of today, of a class by its path of today.

    Raises UserError for an argument that is there under two of its names.
    """
    renamed = ARGUMENTS.get(path, {})
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        new = renamed.get(name, name)
        if new is None:
            continue
        if new in arguments:
            raise UserError(f"config of {path}: {new} is given twice, also by a former name")
        arguments[new] = value
    return arguments


def renewed(config: Any) -> Any:
    """A config (plain data, nested) with the class paths and argument names of today."""
    if isinstance(config, list):
        return [renewed(item) for item in config]
    if not isinstance(config, dict):
        return config
    if set(config) != {"class_path", "init_args"} or not isinstance(config["init_args"], dict):
        return {key: renewed(item) for key, item in config.items()}
    path = current_path(str(config["class_path"]))
    return {"class_path": path, "init_args": renewed(current_arguments(path, config["init_args"]))}
