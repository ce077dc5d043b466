"""Replays of ResTok's tokenizer (cases `tok_*` of system `restok`, whose images are in [0, 1])."""

import torch
from torch import Tensor

from tessellar.parity.forms import as_map, as_row, as_vectors, from_unit, to_unit
from tessellar.parity.recording import Outputs, Recording
from tessellar.parity.registration import replays
from tessellar.parity.stand_ins import Fixed
from tessellar.protocol.tokenizer import TokenizerOutput
from tessellar.tokenizers.losses.adversarial import discriminator_adversarial
from tessellar.tokenizers.losses.parity import recorded_lecam
from tessellar.tokenizers.losses.reconstruction import Reconstruction
from tessellar.tokenizers.losses.tokenizer_loss import TokenizerLoss
from tessellar.tokenizers.restok.official import from_official
from tessellar.tokenizers.restok.tokenizer import ResTok
from tessellar.tokenizers.restok.transformers import residual_pyramid

READ = (
    "codebook_size token_size use_l2_norm commitment_cost entropy_loss_ratio vit_enc_model_size vit_dec_model_size "
    "vit_enc_patch_size vit_dec_patch_size num_latent_tokens num_min_tokens test_num_latent_tokens hierarchy_stages "
    "drop_prob use_vf"
).split()
ALWAYS = (
    "merge_tokens residual_image_tokens residual_latent_tokens learnable_dec_image_tokens multi_quant vae_encoder "
    "drop_latent_tokens latent_hierarchy encoder_feature_supervision decoder_feature_supervision "
    "learnable_dec_feat_tokens reverse_proj"
).split()
SUPPORTED = {**dict.fromkeys(ALWAYS, True), "learnable_latent_tokens": False}
SUPPORTED |= {"rope_base_len": 10000, "reduction_ratio": 0.5}

CNN_READ = "hidden_channels channel_mult num_res_blocks z_channels".split()
LOSS_READ = "weights discriminator_weight discriminator_start lecam vf_weight cos_margin".split()


def recorded_tokenizer(recording: Recording) -> ResTok:
    """Our tokenizer with the recorded weights."""
    config = recording.config
    model = recording.options("vq_model", READ, SUPPORTED)
    made = from_official(
        recording.weights["tokenizer"],
        image_size=config["crop_size"],
        heads=(config["encoder"]["heads"], config["decoder"]["heads"]),
        min_tokens=model["num_min_tokens"],
        drop=model["drop_prob"],
        legacy=config["is_legacy"],
        vision_margin=config["losses"]["cos_margin"],
        quantizer_options={
            "l2_normalize": model["use_l2_norm"],
            "commitment_weight": model["commitment_cost"],
            "entropy_weight": model["entropy_loss_ratio"],
        },
    )
    recording.options("cnn", CNN_READ, {"groups": 32})
    stride = config["crop_size"] // made.decoder.grid[0]
    sizes = {
        "vit_enc_patch_size": stride,
        "vit_dec_patch_size": stride,
        "num_latent_tokens": made.layout.length,
        "test_num_latent_tokens": made.layout.length,
        "hierarchy_stages": len(made.encoder.merging) + 1,
    }
    recording.check_sizes(sizes, "vq_model")
    return made


@replays("restok", "tok_shared", "tok_main")
def encoding_and_decoding(recording: Recording) -> Outputs:
    """What the encoder makes of images step by step, and images of all tokens and of a prefix."""
    made = recorded_tokenizer(recording)
    assert made.encoder_to_vision is not None
    encoder = made.encoder
    features = made.features(from_unit(recording.inputs["image"]))
    after_block: list[Tensor] = []
    for block in encoder.blocks:
        keep_output(block, after_block)
    sequence = encoder.sequence(features)
    encoded = encoder.run(sequence)
    latents = made.latents(encoded)
    quantized = made.quantizer(latents)
    tokens = quantized.tokens
    codes = quantized.quantized
    first = [encoder.grid]
    last = first
    for _ in encoder.merging:
        height, width = last[0]
        last = [(height, width // 2), *last]
    outputs = {
        "cnn_features": features,
        "latent_init": residual_pyramid(encoder.project(features), encoder.sizes),
        "enc_in": sequence,
        "enc_after_first_merge": after_block[recording.settings("enc_after_first_merge")["block"]],
        "enc_last": after_block[-1],
        "enc_mask_first": encoder.facts(first, features.device)[1][0, 0].to(torch.uint8),
        "enc_mask_last": encoder.facts(last, features.device)[1][0, 0].to(torch.uint8),
        "enc_latents_ln": encoded.latents,
        "z": as_row(latents),
        "last_image_tokens": as_row(encoded.coarsest),
        "indices": tokens[:, None],
        "z_q": as_row(codes),
        "recon": to_unit(made.render(codes)),
        "dec_vf_feat": as_map(made.decoder.features(codes), made.decoder.grid[0]),
        "recon_tokens": to_unit(made.decode(tokens)),
        "enc_vf_proj": as_row(made.encoder_to_vision(encoded.coarsest)),
    }
    for name, settings in recording.each("recon_keep*"):
        outputs[name] = to_unit(made.decode(tokens[:, : settings["num_tokens"]]))
    return outputs


def keep_output(block: torch.nn.Module, kept: list[Tensor]) -> None:
    """Have a block leave behind what it gives: its MLP is its last step."""
    run = block.mlp

    def keeping(x: Tensor) -> Tensor:
        kept.append(run(x))  # type: ignore[operator]
        return kept[-1]

    object.__setattr__(block, "mlp", keeping)


@replays("restok", "tok_shared", "tok_train")
def training(recording: Recording) -> Outputs:
    """A pass that keeps a prefix of the tokens of each image, and how likely each length is."""
    made = recorded_tokenizer(recording)
    assert made.decoder_to_vision is not None
    images = from_unit(recording.inputs["image"])
    keep = recording.inputs["nested_keep"]
    codes = made.quantizer(made.latents(made.encoder(made.features(images)))).quantized
    cells = made.decoder_to_vision(made.decoder.features(codes, keep))
    counts = recording.settings("nested_probs")["keep_counts"]
    return {
        "nested_probs": torch.tensor([made.keeps[count] for count in counts], dtype=torch.float64),
        "recon_train": to_unit(made.forward_with(images, keep).reconstruction),
        "dec_vf_proj": as_map(cells, made.decoder.grid[0]),
    }


@replays("restok", "tok_shared", "tok_loss")
def losses(recording: Recording) -> Outputs:
    """The losses of both sides, with the recorded perceptual distance and logits."""
    made = recorded_tokenizer(recording)
    images = from_unit(recording.inputs["image"])
    given = recording.inputs
    config = recording.options("losses", LOSS_READ, {"reconstruction": "l2"})
    keep = given["nested_keep"]
    encoded = made.encoder(made.features(images))
    quantized = made.quantizer(made.latents(encoded))
    terms = quantized.losses
    feature = given["aux_feature"]
    grid = (feature.shape[2], feature.shape[3])
    pooled = given["aux_cls"].flatten(1)
    vision = made.vision_loss(
        encoded, quantized.quantized, keep, pooled=pooled, patches=as_vectors(feature), grid=grid
    )
    rendered = made.render(quantized.quantized, keep)
    output = TokenizerOutput(
        rendered, quantized.tokens, {**terms, "vision": config["vf_weight"] * vision}
    )
    real = given["disc_logits_real"]
    fake = given["disc_logits_fake"]
    loss = TokenizerLoss(
        Reconstruction(l1=0.0, l2=0.25 * config["weights"]),  # a square of images in [0, 1]
        Fixed(given["lpips_value"]),
        discriminator=Fixed(fake),
        adversarial_weight=config["discriminator_weight"],
        adversarial_start=config["discriminator_start"],
    )
    settings = recording.settings("loss_disc")
    lecam = recorded_lecam(settings)
    discriminator = discriminator_adversarial(real, fake, settings["disc_loss"]) + lecam(real, fake)
    outputs = {
        "loss_quantizer_loss": torch.stack(list(terms.values())).sum(),
        "loss_commitment_loss": terms["commitment"],
        "loss_codebook_loss": terms["codebook"],
        "loss_entropy_loss": terms["entropy"],
        "loss_vf": vision,
        "loss_rec": 0.25 * loss.reconstruction(images, rendered)["l2"],
        "loss_disc": discriminator,
        "lecam_ema_real_after": lecam.means[:1],
        "lecam_ema_fake_after": lecam.means[1:],
    }
    for name, settings in recording.each("loss_total_*"):
        step = settings["global_step"]
        outputs[name] = loss.generator_loss(images, output, step, made.last_layer).total
    return outputs
