"""Every setting once: frozen dataclasses are the schema, the defaults and the documentation.

A YAML file holds differences from these defaults and `section.key=value` on the command line has the last word
(modules/settings.py reads both); modules/rules.py holds what settings must keep together.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """One run: its directory, seed, device and rhythm."""

    name: str = ""  # directory below `dir`; empty: the config file's stem
    dir: str = "runs"  # parent of run directories
    seed: int = 0  # >= 0; every random draw is a function of it and of what is drawn
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | fp32 | fp16 | bf16: the encoder's autocast; auto: bf16 on a GPU or a CPU with AMX
    # (but fp32 for images of at most 16 pixels a side on a CPU: see modules/runtime.py)
    threads: int = 0  # CPU threads of torch; 0 leaves torch's own choice
    kernels: str = "auto"  # auto | torch | triton: which implementation of each op in kernels/ runs
    log_every: int = 10  # steps between metric rows
    checkpoint_every: int = 50  # steps between checkpoints
    keep_checkpoints: int = 2  # valid checkpoints kept while the run goes on, >= 1
    cache_dir: str = ""  # token cache shared by runs; empty: <run.dir>/cache


@dataclass(frozen=True)
class Data:
    """The image set and how it is read."""

    root: str = "embedded:parts64"  # class folders, a CSV file, a zip pack, an MVIP tree, or embedded:<pack>
    image_size: int = 64  # pixels a side at which real and generated images are stored and learned from
    shots_per_class: int = 0  # train images a class, drawn from the seed, spread over groups first; 0: all
    val_fraction: float = 0.2  # (0, 1): share of train groups that become val where the set has no val split
    near_ood_classes: tuple[str, ...] = ()  # classes held out as near-OOD, where the set declares no roles
    near_ood_val_fraction: float = 0.34  # (0, 1): share of the held-out classes kept for choosing settings
    far_ood_root: str = ""  # another image set whose test images are far-OOD; empty: none
    on_bad_image: str = "fail"  # fail | skip
    max_pixels: int = 50_000_000  # header size above which a file is refused before it is decoded
    crop_to_mask: bool = False  # crop each image to its object mask
    crop_margin: float = 0.1  # >= 0: margin round the object, share of the object's longer side
    background: str = "keep"  # keep | gray: what stands outside the object mask
    super_class: str = ""  # MVIP: take the ID classes from this super class; empty: all
    num_classes: int = 0  # MVIP: how many ID classes, drawn from class_seed after sorting by name; 0: all
    class_seed: int = 0  # MVIP: seed of that draw


@dataclass(frozen=True)
class Pipeline:
    """The Stable Diffusion that generates."""

    path: str = "embedded"  # diffusers folder, single .safetensors file, or embedded
    weights: str = "file"  # file | random: random builds the exact SD 1.5 shape, for timing where no weights are
    family: str = "auto"  # auto | sd1 | sd2 | turbo | lcm: what a single file or a LoRA is, where no file says so
    prediction_type: str = ""  # epsilon | v_prediction, for a single file that does not say; empty: read it
    lora: str = ""  # .safetensors file of a LoRA for the UNet
    vae: str = ""  # folder of another AutoencoderKL or an AutoencoderTiny (TAESD)
    resolution: int = 0  # pixels a side at which images are generated; 0: the UNet's own
    dtype: str = "auto"  # auto | fp32 | fp16 | bf16; auto is fp16 on a GPU, on a CPU bf16 with AMX, else fp32
    attention: str = "auto"  # auto | sdpa | sdpa_flash | sdpa_cudnn | sdpa_efficient | xformers
    compile: str = "auto"  # auto | off | on: torch.compile and graph capture of the tick; auto is on for a GPU
    preset: str = "exact"  # exact | fast | faster | turbo
    allow_download: bool = False  # let huggingface-hub fetch pipeline.path; nothing is fetched otherwise


@dataclass(frozen=True)
class Inversion:
    """Textual inversion: how class tokens are learned."""

    images_per_class: int = 200  # training images seen a class (DA-Fusion: 4,000)
    batch_size: int = 20  # rows a step, drawn from several classes
    num_vectors: int = 1  # token vectors a class
    initializer: str = "object"  # word whose trained row starts every class vector; keywords: each class's own (MVIP)
    lr: float = 2e-3  # Adam, per class, constant after warm-up
    flip: float = 0.5  # probability of a horizontal flip
    class_agnostic: bool = False  # no learned tokens: every prompt uses the initializer (Real Guidance control)


@dataclass(frozen=True)
class Generation:
    """How many images are generated, how, and what share of a batch they are."""

    images_per_step: float = 4.0  # diffusion images finished an optimizer step: what generation costs
    synthetic_fraction: float = 0.4  # [0, 1): share of generated rows in a batch: what a batch is made of
    near_ood_fraction: float = 0.5  # [0, 1]: share of near-OOD images among the generated ones
    slots: int = 16  # images in flight, the rows of one UNet call (twice that with guidance)
    solver: str = "ddim"  # ddim | euler | dpmpp_2m | lcm
    num_inference_steps: int = 20  # T_n, steps of the whole time grid
    guidance_scale: float = 3.0  # w in eps_u + w (eps_c - eps_u); 1 switches guidance off
    strengths: dict = field(default_factory=lambda: {0.4: 1.0})  # positives: strength -> weight
    conditions: dict = field(default_factory=lambda: {"": 1.0})  # word -> weight; "": none, keywords: the class's own
    templates: tuple[str, ...] = ("a photo of a {}",)  # prompt templates of generation
    max_uses: int = 8  # batches a generated image may serve in
    max_age: int = 0  # optimizer steps a generated image may live; 0: no bound
    ring_size: int = 8  # images kept for each (class, role)
    prefill: float = 0.5  # [0, 1]: share of every ring filled before step 0; less of the rarer role, as it is rarer
    decode_batch: int = 8  # finished latents decoded at once
    mode: str = "auto"  # auto | sequential | stream: how generation and training share the device
    mask_edit: str = "none"  # none | object | background: what a masked positive may change
    mask_dilation_px: int = 1  # pixels at generation resolution by which the object mask grows
    roundtrip_fraction: float = 0.0  # [0, 1]: share of real rows that pass through encode and decode
    kv_cache_gib: float = 2.0  # bound of the cross-attention K/V cache


@dataclass(frozen=True)
class NearOOD:
    """What near-OOD images are made of."""

    recipes: dict = field(default_factory=lambda: {"strength": 1.0, "token_mix": 1.0})  # recipe -> weight
    strength: float = 0.75  # of every diffusion recipe but mask_split, which destroys the object: 1
    mix: tuple[float, float] = (0.35, 0.65)  # token_mix: range of the partner's weight
    noise: float = 1.0  # token_noise: length of the noise / that of the token; sigma a number: this / sqrt(width)
    negative_guidance: float = -1.0  # negative_guidance: w <= 0
    jigsaw_grid: int = 4  # jigsaw: patches a side
    outlier_quantile: float = 0.02  # embedding_outlier: density quantile below which a token is drawn


@dataclass(frozen=True)
class Gate:
    """Which generated images may be learned from.

    Broken images are always left out and counted. The learner's rates are logged where gate or controller is on: they cost
    a pass over the train images at every refresh.
    """

    enabled: bool = False  # whether made images are judged before they are kept
    start_step: int = 50  # optimizer step from which images are judged, for the gate and for the controller
    refresh_every: int = 25  # steps between refreshes of the class statistics
    quantile: float = 0.05  # leave-one-out similarity quantile of the class that a positive must reach, (0, 1)
    near_ood_quantile: float = 0.5  # that a near-OOD image must stay below; at .05 not even real ones do so early on
    far_floor: float = -0.2  # [-1, 1]: cosine to the nearest class below which a near-OOD image is too far
    retries: int = 2  # draws again before falling back


@dataclass(frozen=True)
class Controller:
    """The closed loop from the learner back to the strength."""

    enabled: bool = False  # whether strengths follow how like their class images are
    target_low: float = 0.55  # band of the positives' mean likeness to their class; 1 is that of real images
    target_high: float = 0.85  # above target_low; near-OOD images have the band of equal width below
    gain: float = 0.05  # (0, 1]: change of strength an update
    update_every: int = 25  # steps, >= 1


@dataclass(frozen=True)
class Encoder:
    """The image encoder and its projection head."""

    arch: str = "auto"  # auto | small_resnet | resnet18 | resnet50; auto chooses by data.image_size
    width: int = 32  # channels of small_resnet's first stage
    head_dim: int = 128  # E, width of the projection
    separate_batchnorm: bool = False  # own BatchNorm statistics for generated rows
    channels_last: bool = True  # memory layout of its weights and views


@dataclass(frozen=True)
class Learning:
    """What the encoder learns from a batch, and for how long."""

    method: str = "supcon"  # supcon | cross_entropy | simclr
    steps: int = 300  # optimizer steps
    classes_per_batch: int = 16  # P
    rows_per_class: int = 3  # K; P x K real rows a batch
    extra_real_rows: int = 0  # further real rows, for arms without generated ones
    temperature: float = 0.1  # tau
    ood_columns: str = "global"  # none | global | own_class | foreign_class: which near-OOD rows an anchor sees
    ood_variant: str = "none"  # none | ood_instance | prototype_push
    ood_weight: float = 1.0  # lambda
    hardness: float = 0.0  # beta of hard-negative reweighting; 0 is plain SupCon
    outlier_exposure: float = 0.0  # cross_entropy: weight of the uniform target on near-OOD rows
    augment: str = "standard"  # standard | strong (TrivialAugmentWide + RandomErasing)
    crop_scale: tuple[float, float] = (0.3, 1.0)  # random-resized-crop, share of the area
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # [0, 1]: share of views whose colors are jittered
    grayscale_p: float = 0.2  # [0, 1]: share of views without color
    optimizer: str = "sgd"  # sgd | adamw | sgd8bit | adamw8bit
    lr: float = 0.1  # at 256 rows a batch; scaled linearly with the batch
    momentum: float = 0.9  # [0, 1): of sgd
    weight_decay: float = 1e-4  # of weights, not of biases and norms
    warmup_steps: int = 20  # over which the rate rises linearly; a cosine to 0 follows
    ema_decay: float = 0.0  # [0, 1): 0 switches the averaged encoder off
    max_grad_norm: float = 0.0  # 0: no clipping


@dataclass(frozen=True)
class Probe:
    """The linear readout of frozen features."""

    lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # trained at once, chosen on val
    epochs: int = 100  # passes over the train features
    batch_size: int = 256  # images
    weight_decay: float = 0.0  # of the linear probe


@dataclass(frozen=True)
class Evaluation:
    """Scores, intervals, and what is looked at on the way."""

    score: str = "knn"  # headline OOD score, fixed before the run
    test: bool = True  # whether test images are scored; false while settings are chosen: evaluate reads them later
    bootstrap: int = 1000  # resamples of groups; 0: no intervals
    confidence: float = 0.95  # (0, 1): of intervals
    batch_size: int = 256  # images embedded at once
    knn_every: int = 0  # steps between kNN accuracies on val while training; 0: at the end only
    tsne_points: int = 800  # points of the embedding map; below 3: no map
    judge_steps: int = 120  # steps of the classifier that judges generated images, fixed before training; 0: none


@dataclass(frozen=True)
class Tune:
    """The search for the right ratio of generated images a step."""

    grid: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)  # images_per_step tried
    steps: int = 12  # timed steps a grid point
    max_hours: float = 0.0  # bound on the run; 0: none
    max_slowdown: float = 2.0  # bound on step time relative to no generation; 0: none
    max_reuse: float = 0.0  # bound on reuse; 0: none


@dataclass(frozen=True)
class Config:
    """The settings of every verb but `train-pipeline`."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    pipeline: Pipeline = field(default_factory=Pipeline)
    inversion: Inversion = field(default_factory=Inversion)
    generation: Generation = field(default_factory=Generation)
    near_ood: NearOOD = field(default_factory=NearOOD)
    gate: Gate = field(default_factory=Gate)
    controller: Controller = field(default_factory=Controller)
    encoder: Encoder = field(default_factory=Encoder)
    learning: Learning = field(default_factory=Learning)
    probe: Probe = field(default_factory=Probe)
    evaluation: Evaluation = field(default_factory=Evaluation)
    tune: Tune = field(default_factory=Tune)


@dataclass(frozen=True)
class PipelineShape:
    """The size of every part of a pipeline made from scratch; at 64 px a UNet call stays under .4 GFLOP."""

    resolution: int = 64  # pixels a side
    vae_channels: tuple[int, ...] = (32, 48, 64)  # one a resolution, multiples of 16; latents 2^(n-1) smaller
    unet_channels: tuple[int, ...] = (48, 80, 128)  # one a resolution, multiples of 8
    text_width: int = 96  # numbers an embedding, a multiple of text_heads
    text_layers: int = 3  # of the text encoder
    text_heads: int = 4  # of its attention
    max_tokens: int = 32  # tokens of a prompt
    vocabulary: int = 1200  # entries of the byte-pair encoding at most, its 512 bytes included


@dataclass(frozen=True)
class PipelineTraining:
    """How a pipeline is trained from scratch."""

    out: str = ""  # folder of the finished pipeline; empty: pipeline below the run directory
    start: str = ""  # pipeline folder, or embedded: its text encoder and UNet are trained on; empty: none
    vae_steps: int = 3600  # without `start`
    further_vae_steps: int = 0  # with `start`: steps that its VAE is trained on first; 0 keeps it as it is
    vae_batch: int = 16  # images a step
    vae_lr: float = 1.5e-3  # of AdamW, at its peak
    kl_weight: float = 1e-6  # of the KL term beside the reconstruction
    unet_steps: int = 6500  # of UNet and text encoder together
    unet_batch: int = 64  # images a step
    unet_lr: float = 1e-3  # of AdamW, at its peak
    warmup_steps: int = 200  # over which either rate rises linearly
    caption_dropout: float = 0.1  # share of rows with an empty caption, for classifier-free guidance
    instance_tokens: float = 0.35  # share of rows whose noun becomes the object's own token
    object_word: float = 0.1  # share of rows whose noun becomes "object"
    min_snr_gamma: float = 5.0  # cap of the loss weight by signal-to-noise ratio
    ema_decay: float = 0.999  # [0, 1): of the averaged weights that are kept
    bf16: bool = True  # autocast of the VAE, where the device has bf16


@dataclass(frozen=True)
class PipelineConfig:
    """The settings of `train-pipeline`."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    shape: PipelineShape = field(default_factory=PipelineShape)
    training: PipelineTraining = field(default_factory=PipelineTraining)
