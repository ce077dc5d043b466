"""Networks that the field measures with, by name: architecture, input size, resize, features.

The six of FDr^6 (arXiv 2604.28190) read images with torch's antialiased bicubic, not clamped, in
bfloat16 (the Inception network in float32); 256 pixels are padded to 266 = 19 x 19 patches of 14.
`dinov2` is the network of FD-DINOv2 as dgm-eval has it (224 pixels, Pillow's resize of 8 bits),
`dinov2-torch` as EDM2 has it, `clip-336` that of CMMD (arXiv 2401.09603). Weights are timm's files:
none of them has been at hand here, so their hashes are in records, and are not compared with any.
"""

from tessellar.networks.facts import NetworkFacts

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _of_fdr6(
    name: str,
    arch: str,
    size: int,
    values: tuple[tuple[float, float, float], tuple[float, float, float]],
    **more: object,
) -> NetworkFacts:
    return NetworkFacts(
        name=name,
        arch=arch,
        num_classes=0,
        image_size=(size, size),
        resize="torch-bicubic",
        mean=values[0],
        std=values[1],
        precision="bf16",
        **more,  # type: ignore[arg-type]
    )


ANY_SIZE: dict[str, int | float | bool | str] = {"dynamic_img_size": True}
PADDED: dict[str, int | float | bool | str] = {"dynamic_img_size": True, "dynamic_img_pad": True}
DINOV2 = "vit_large_patch14_dinov2.lvd142m"


def _dinov2(name: str, resize: str) -> NetworkFacts:
    return NetworkFacts(
        name=name,
        arch=DINOV2,
        num_classes=0,
        image_size=(224, 224),
        resize=resize,  # type: ignore[arg-type]
        mean=IMAGENET[0],
        std=IMAGENET[1],
        options=ANY_SIZE,
        readout="class-token",
    )


STANDARD = {
    facts.name: facts
    for facts in (
        _of_fdr6(
            "convnext", "convnextv2_base.fcmae_ft_in22k_in1k", 224, IMAGENET, readout="mean-map"
        ),
        _of_fdr6("dinov2-256", DINOV2, 256, IMAGENET, options=PADDED, readout="class-token"),
        _of_fdr6("mae", "vit_large_patch16_224.mae", 224, IMAGENET, readout="class-token"),
        # Without a class token: the output of its attention pool.
        _of_fdr6("siglip2", "vit_so400m_patch16_siglip_256.v2_webli", 224, HALF, options=ANY_SIZE),
        _of_fdr6(
            "clip-256",
            "vit_large_patch14_clip_224.openai",
            256,
            CLIP,
            options=PADDED,
            readout="class-token",
        ),
        _dinov2("dinov2", "pil-bicubic"),
        _dinov2("dinov2-torch", "torch-bicubic"),
        NetworkFacts(
            name="clip-336",
            arch="vit_large_patch14_clip_336.openai",
            num_classes=768,
            image_size=(336, 336),
            resize="torch-bicubic",
            mean=CLIP[0],
            std=CLIP[1],
            readout="head",
        ),
    )
}

FDR6 = ("inception", "convnext", "dinov2-256", "mae", "siglip2", "clip-256")
FDR6_VALIDATION = {
    "inception": 1.6774,
    "convnext": 56.868,
    "dinov2-256": 14.185,
    "mae": 0.04284,
    "siglip2": 0.60489,
    "clip-256": 5.6047,
}
"""Distances of ImageNet's validation images from its training images, 256 pixels by ADM's crop: the
denominators of FDr^6, not rounded (the released script divides by rounded ones: 0.04 is 7 % off)."""
