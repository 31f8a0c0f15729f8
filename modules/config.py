"""All settings, as frozen dataclasses that serve as schema, defaults and documentation.

A YAML file holds differences from these defaults, and `section.key=value` on the command line overrides both
(modules/settings.py reads them). Allowed values are in modules/ranges.py, rules across settings in modules/rules.py.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """One run: its directory, seed, device, and intervals of logging and checkpoints."""

    name: str = ""  # directory below `dir`; empty: the config file's name without suffix
    dir: str = "runs"  # parent of run directories
    seed: int = 0  # >= 0; every random draw depends only on it and on what is drawn
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | fp32 | fp16 | bf16: the encoder's autocast; auto: bf16 on a GPU or a CPU with AMX
    # (but fp32 for images of at most 16 pixels a side on a CPU: see modules/runtime.py)
    threads: int = 0  # CPU threads of torch; 0: torch's default
    kernels: str = "auto"  # auto | torch | triton: which implementation of the ops in kernels/ is used
    log_every: int = 10  # steps between metric rows
    checkpoint_every: int = 50  # steps between checkpoints
    keep_checkpoints: int = 2  # valid checkpoints kept while the run goes on, >= 1
    cache_dir: str = ""  # token cache shared by runs; empty: <run.dir>/cache


@dataclass(frozen=True)
class Data:
    """The image set and how it is read and split."""

    root: str = "embedded:parts64"  # class folders, a CSV file, a zip pack, an MVIP tree, or embedded:<pack>
    image_size: int = 64  # pixels per side at which real and generated images are stored and learned from
    shots_per_class: int = 0  # train images per class, drawn by the seed, spread over groups first; 0: all
    val_fraction: float = 0.2  # (0, 1): share of train groups that become val if the set has no val split
    near_ood_classes: tuple[str, ...] = ()  # classes held out as near-OOD, if the set declares no roles
    near_ood_val_fraction: float = 0.34  # (0, 1): share of the held-out classes used for choosing settings
    far_ood_root: str = ""  # another image set whose test images are far-OOD; empty: none
    on_bad_image: str = "fail"  # fail | skip
    max_pixels: int = 50_000_000  # image size in the file header above which it is refused before decoding
    crop_to_mask: bool = False  # crop each image to its object mask
    crop_margin: float = 0.1  # >= 0: margin around the object, as a share of its longer side
    background: str = "keep"  # keep | gray: pixels outside the object mask
    super_class: str = ""  # MVIP: take the ID classes from this super class; empty: all
    num_classes: int = 0  # MVIP: how many ID classes, drawn by class_seed after sorting by name; 0: all
    class_seed: int = 0  # MVIP: seed of that draw


@dataclass(frozen=True)
class Pipeline:
    """The Stable Diffusion pipeline that generates images."""

    path: str = "embedded"  # diffusers folder, single .safetensors file, or embedded
    weights: str = "file"  # file | random: random builds the exact SD 1.5 shape, for timing without weights
    family: str = "auto"  # auto | sd1 | sd2 | turbo | lcm: kind of a single file or a LoRA, if no file says so
    prediction_type: str = ""  # epsilon | v_prediction, for a single file that does not say; empty: read it
    lora: str = ""  # .safetensors file of a LoRA for the UNet
    vae: str = ""  # folder of another AutoencoderKL or an AutoencoderTiny (TAESD)
    resolution: int = 0  # pixels per side at which images are generated; 0: the UNet's own
    dtype: str = "auto"  # auto | fp32 | fp16 | bf16; auto is fp16 on a GPU, on a CPU bf16 with AMX, else fp32
    attention: str = "auto"  # auto | sdpa | sdpa_flash | sdpa_cudnn | sdpa_efficient | xformers
    compile: str = "auto"  # auto | off | on: torch.compile and graph capture of the tick; auto is on for a GPU
    preset: str = "exact"  # exact | fast | faster | turbo
    allow_download: bool = False  # let huggingface-hub fetch pipeline.path; nothing is fetched otherwise


@dataclass(frozen=True)
class Inversion:
    """Textual inversion: how class tokens are learned."""

    images_per_class: int = 200  # training images seen per class (DA-Fusion: 4,000)
    batch_size: int = 20  # rows per step, drawn from several classes
    num_vectors: int = 1  # token vectors per class
    initializer: str = "object"  # word whose embedding initializes class vectors; keywords: each class's own (MVIP)
    lr: float = 2e-3  # Adam, per class, constant after warm-up
    flip: float = 0.5  # probability of a horizontal flip
    class_agnostic: bool = False  # no learned tokens: every prompt uses the initializer (Real Guidance control)


@dataclass(frozen=True)
class Generation:
    """How many images are generated, how, and what share of a batch they are."""

    images_per_step: float = 4.0  # diffusion images finished per optimizer step: what generation costs
    synthetic_fraction: float = 0.4  # [0, 1): share of generated rows in a batch: what the learner sees
    near_ood_fraction: float = 0.5  # [0, 1]: share of near-OOD images among the generated ones
    slots: int = 16  # images in flight, the rows of one UNet call (twice that with guidance)
    solver: str = "ddim"  # ddim | euler | dpmpp_2m | lcm
    num_inference_steps: int = 20  # T_n, steps of the whole time grid
    guidance_scale: float = 3.0  # w in eps_u + w (eps_c - eps_u); 1 switches guidance off
    strengths: dict = field(default_factory=lambda: {0.4: 1.0})  # positives: strength -> weight
    conditions: dict = field(default_factory=lambda: {"": 1.0})  # word -> weight; "": none, keywords: the class's own
    templates: tuple[str, ...] = ("a photo of a {}",)  # prompt templates of generation
    max_uses: int = 8  # batches a generated image may be used in
    max_age: int = 0  # optimizer steps a generated image may be used for; 0: no bound
    ring_size: int = 8  # images kept for each (class, role)
    prefill: float = 0.5  # [0, 1]: share of every ring filled before step 0; proportionally less of the rarer role
    decode_batch: int = 8  # finished latents decoded at once
    mode: str = "auto"  # auto | sequential | stream: how generation and training share the device
    mask_edit: str = "none"  # none | object | background: what a masked positive may change
    mask_dilation_px: int = 1  # pixels at generation resolution by which the object mask grows
    roundtrip_fraction: float = 0.0  # [0, 1]: share of real rows replaced by their VAE reconstruction
    kv_cache_gib: float = 2.0  # upper bound of the cross-attention K/V cache


@dataclass(frozen=True)
class NearOOD:
    """How near-OOD images are generated."""

    recipes: dict = field(default_factory=lambda: {"strength": 1.0, "token_mix": 1.0})  # recipe -> weight
    strength: float = 0.75  # of every diffusion recipe except mask_split, which always uses 1 and destroys the object
    mix: tuple[float, float] = (0.35, 0.65)  # token_mix: range of the other class's weight
    noise: float = 1.0  # token_noise: noise length / token length; sigma: this x token length / sqrt(width)
    negative_guidance: float = -1.0  # negative_guidance: w <= 0
    jigsaw_grid: int = 4  # jigsaw: patches per side
    outlier_quantile: float = 0.02  # embedding_outlier: density quantile below which a token is drawn


@dataclass(frozen=True)
class Gate:
    """Which generated images the learner may be trained on.

    Broken images are always left out and counted. The learner's acceptance rates are logged if gate or controller is
    on: they cost a pass over the train images at every refresh.
    """

    enabled: bool = False  # whether the learner judges generated images before they are kept
    start_step: int = 50  # optimizer step from which images are judged, for the gate and for the controller
    refresh_every: int = 25  # steps between refreshes of the class statistics
    quantile: float = 0.05  # (0, 1): quantile of the class's leave-one-out similarities that a positive must reach
    near_ood_quantile: float = 0.5  # same, that a near-OOD image must stay below; at .05 not even real ones do early on
    far_floor: float = -0.2  # [-1, 1]: cosine to the nearest class below which a near-OOD image is too far
    retries: int = 2  # further attempts at a rejected image before falling back


@dataclass(frozen=True)
class Controller:
    """The feedback loop that adjusts strengths by how similar the learner finds images to their class."""

    enabled: bool = False  # whether strengths are adjusted
    target_low: float = 0.55  # band of the positives' mean similarity to their class; that of real images is 1
    target_high: float = 0.85  # above target_low; the band of near-OOD images lies below and is as wide
    gain: float = 0.05  # (0, 1]: change of strength per update
    update_every: int = 25  # steps, >= 1


@dataclass(frozen=True)
class Encoder:
    """The image encoder and its projection head."""

    arch: str = "auto"  # auto | small_resnet | resnet18 | resnet50; auto chooses by data.image_size
    width: int = 32  # channels of small_resnet's first stage
    head_dim: int = 128  # E, width of the projection
    separate_batchnorm: bool = False  # separate BatchNorm statistics for generated rows
    channels_last: bool = True  # memory layout of weights and views


@dataclass(frozen=True)
class Learning:
    """What the encoder learns from a batch, and for how long."""

    method: str = "supcon"  # supcon | cross_entropy | simclr
    steps: int = 300  # optimizer steps
    classes_per_batch: int = 16  # P
    rows_per_class: int = 3  # K; P x K real rows a batch
    extra_real_rows: int = 0  # further real rows per batch, for arms without generated ones
    temperature: float = 0.1  # tau
    ood_columns: str = "global"  # none | global | own_class | foreign_class: near-OOD rows in an anchor's denominator
    ood_variant: str = "none"  # none | ood_instance | prototype_push
    ood_weight: float = 1.0  # lambda
    hardness: float = 0.0  # beta of hard-negative reweighting; 0 is plain SupCon
    outlier_exposure: float = 0.0  # cross_entropy: weight of the uniform target on near-OOD rows
    augment: str = "standard"  # standard | strong (TrivialAugmentWide + RandomErasing)
    crop_scale: tuple[float, float] = (0.3, 1.0)  # random-resized-crop: share of the image's area
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # [0, 1]: share of views whose colors are jittered
    grayscale_p: float = 0.2  # [0, 1]: share of views without color
    optimizer: str = "sgd"  # sgd | adamw | sgd8bit | adamw8bit
    lr: float = 0.1  # peak at 256 rows per batch; scaled linearly with the batch
    momentum: float = 0.9  # [0, 1): of sgd
    weight_decay: float = 1e-4  # of weights, not of biases and norms
    warmup_steps: int = 20  # of linear warm-up, followed by a cosine to 0
    ema_decay: float = 0.0  # [0, 1): of the averaged encoder; 0: none
    max_grad_norm: float = 0.0  # 0: no clipping


@dataclass(frozen=True)
class Probe:
    """The linear probe trained on frozen features."""

    lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # learning rates trained at once; val chooses
    epochs: int = 100  # passes over the train features
    batch_size: int = 256  # images
    weight_decay: float = 0.0  # of the linear probe


@dataclass(frozen=True)
class Evaluation:
    """Scores, confidence intervals, and evaluations during training."""

    score: str = "knn"  # headline OOD score, fixed before the run
    test: bool = True  # whether test images are scored; false while choosing settings: `evaluate` scores them later
    bootstrap: int = 1000  # resamples of groups; 0: no intervals
    confidence: float = 0.95  # (0, 1): level of the intervals
    batch_size: int = 256  # images embedded at once
    knn_every: int = 0  # steps between kNN accuracies on val while training; 0: at the end only
    tsne_points: int = 800  # points of the embedding map; below 3: no map
    judge_steps: int = 120  # steps of the classifier that judges generated images, fixed before training; 0: none


@dataclass(frozen=True)
class Tune:
    """The search for the number of generated images per step."""

    grid: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)  # images_per_step tried
    steps: int = 12  # timed steps per grid point
    max_hours: float = 0.0  # bound on the duration of the run; 0: none
    max_slowdown: float = 2.0  # bound on step time relative to no generation; 0: none
    max_reuse: float = 0.0  # bound on reuse; 0: none


@dataclass(frozen=True)
class Config:
    """The settings of every verb except `train-pipeline`."""

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

    resolution: int = 64  # pixels per side
    vae_channels: tuple[int, ...] = (32, 48, 64)  # per resolution, multiples of 16; latents 2^(n-1) smaller
    unet_channels: tuple[int, ...] = (48, 80, 128)  # per resolution, multiples of 8
    text_width: int = 96  # width of an embedding, a multiple of text_heads
    text_layers: int = 3  # of the text encoder
    text_heads: int = 4  # attention heads of the text encoder
    max_tokens: int = 32  # most tokens of a prompt
    vocabulary: int = 1200  # most entries of the byte-pair encoding, including its 512 for bytes


@dataclass(frozen=True)
class PipelineTraining:
    """How a pipeline is trained from scratch."""

    out: str = ""  # folder of the finished pipeline; empty: pipeline below the run directory
    start: str = ""  # pipeline folder, or embedded: training continues from its text encoder and UNet; empty: none
    vae_steps: int = 3600  # without `start`
    further_vae_steps: int = 0  # with `start`: steps for which its VAE is trained first; 0 keeps it as it is
    vae_batch: int = 16  # images per step
    vae_lr: float = 1.5e-3  # peak, of AdamW
    kl_weight: float = 1e-6  # of the KL term, relative to the reconstruction
    unet_steps: int = 6500  # of UNet and text encoder together
    unet_batch: int = 64  # images per step
    unet_lr: float = 1e-3  # peak, of AdamW
    warmup_steps: int = 200  # of linear warm-up, of both rates
    caption_dropout: float = 0.1  # share of rows with an empty caption, for classifier-free guidance
    instance_tokens: float = 0.35  # share of rows whose noun becomes the object's own token
    object_word: float = 0.1  # share of rows whose noun becomes "object"
    min_snr_gamma: float = 5.0  # cap of the loss weight by signal-to-noise ratio
    ema_decay: float = 0.999  # [0, 1): of the averaged weights, which become the pipeline
    bf16: bool = True  # autocast of the VAE's training, if the device has bf16


@dataclass(frozen=True)
class PipelineConfig:
    """The settings of `train-pipeline`."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    shape: PipelineShape = field(default_factory=PipelineShape)
    training: PipelineTraining = field(default_factory=PipelineTraining)
