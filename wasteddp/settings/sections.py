"""The settings of a run: name, default, range and meaning of each, and the combinations that are not allowed.

`wasteddp settings --schema` prints them as a JSON Schema for editors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from wasteddp.files import expand_home

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # an int64
Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Location = Annotated[str, AfterValidator(expand_home)]
Rgb = tuple[Fraction, Fraction, Fraction]
PositiveRgb = tuple[Positive, Positive, Positive]

_MOST_PATIENCE_S = 400  # for one read, so that its error appears before the collectives time out


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_as_number(cls, value: Any, info: Any) -> Any:
        """YAML reads yes, no, on and off as booleans, and pydantic would convert these to 1 and 0."""
        field = cls.model_fields[info.field_name]
        takes_bool = bool in (field.annotation, *get_args(field.annotation))
        if isinstance(value, bool) and not takes_bool and not is_section(field.annotation):
            raise ValueError(
                "a boolean is not allowed (YAML reads yes, no, on and off as booleans); write a word in quotes"
            )
        return value


class Run(_Section):
    out: Location = "runs/resnet50"
    """Folder of the run: settings, log, metrics, checkpoints and the model."""
    seed: Seed = 0
    """Order, augmentation and initial weights depend on it."""
    threads: Count = 0
    """CPU threads of each process; 0: the cores that it may use, divided by the number of processes on the machine."""
    timeout_s: Annotated[float, Field(ge=5, allow_inf_nan=False)] = 300.0
    """Seconds without progress in training or evaluation after which all ranks stop and name the rank that they wait
    for. The start, the first steps and saves may take six times as long."""
    record_steps: bool = False
    """Write steps.jsonl with hashes of each step's samples, images and weights, for `wasteddp verify-resume`."""
    deterministic: bool = False
    """Two runs on the same kind of device, with the same versions and number of processes, end with the same bits, even
    if one was killed and resumed: kernels and ranks add in a fixed order. One or two CPU processes always do so."""


class Data(_Section):
    shards: Location = "shards/trashnet"
    """Folder of the shard set, or its URL: https://, s3://, gs://, hf:// or any other protocol that fsspec supports."""
    staged: Location = ""
    """Folder of a verified copy of `shards` on the node's own disk, to read instead of it; empty: no copy."""
    train_split: str = "train"
    eval_split: str = "val"
    fold: Annotated[int, Field(ge=-1)] = -1
    """Of a set with folds (`wasteddp shard --folds K`): `train` is all folds but this one, 0 to K - 1, and `val` is
    this one. -1: a set without folds."""
    image_size: Annotated[int, Field(ge=16, le=2048)] = 224
    """Side of the square images in training, px."""
    eval_resize: Count = 0
    """Shorter side before the centre crop in evaluation, px; 0: eval_size * 8 / 7, as 256 and 224 for ImageNet."""
    eval_size: Annotated[int, Field(ge=0, le=2048)] = 0
    """Side of the square images in evaluation and prediction, px; 0: image_size. Random crops magnify objects, so a
    network trained at 112 px is often better at 128 px (FixRes)."""
    balance: Fraction = 0.0
    """How evenly classes are drawn. 0: in proportion to their numbers of images; 1: all equally often; 0.5: in
    proportion to the square root. Above 0, an epoch uses images of rare classes several times, and not all images of
    common classes."""
    workers: Count | Annotated[str, Field(pattern=r"^[0-9]+ (threads|processes)$")] = 0
    """Workers that decode images for each training process: "4 processes", "4 threads", or 4 of the default kind, which
    is processes for training on a GPU and threads for training on the CPU. 0: the default number. On a GPU it is the
    process's cores minus one, minus two from five cores on, at most 24; on a CPU one for each CPU thread, at most 8."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """gpu: nvJPEG decodes the plain JPEGs of training, for nodes with too few cores to keep their GPUs busy. The pixels
    differ by a few levels from those decoded on the CPU."""
    prefetch: PositiveInt = 2
    """Batches that are decoded ahead."""
    lanes: Count = 0
    """Lanes of the order; must divide the global batch. 0: as many as the global batch has images."""
    block: PositiveInt = 1
    """Neighbouring samples that are read one after another; 1: a uniform permutation, best for local disks."""
    window: Count = 0
    """Samples of a lane that are shuffled with each other; needed only if block is larger than 1."""
    max_damaged: Count = 0
    """Largest number of unreadable training samples. They are replaced by other samples; one more stops the run."""
    cache: str = ""
    """For URLs only, as are the settings below. Folder for fetched shards, best on a local disk; ~ and $VARIABLES are
    resolved on each machine. Empty: ~/.cache/wasteddp, or wasteddp under $XDG_CACHE_HOME."""
    cache_gb: Positive = 50.0
    """Largest size of the cache, in 10^9 bytes, for all processes of a machine together."""
    fetchers: PositiveInt = 4
    """Shards that each process fetches at the same time, before they are needed."""
    ahead_steps: PositiveInt = 64
    """Steps whose shards are fetched ahead."""
    read_attempts: PositiveInt = 5
    """Attempts to read before the run stops; the waits between them grow from 0.5 s to 30 s."""
    read_timeout_s: Positive = 30.0
    """Seconds without receiving a byte after which an attempt fails."""

    @property
    def num_workers(self) -> int:
        """The number in `workers`; 0: the default number."""
        return int(str(self.workers).split()[0])

    def uses_processes(self, device_type: str) -> bool:
        """Return whether processes decode the images if the network runs on this type of device."""
        asked = str(self.workers).partition(" ")[2]
        return asked == "processes" if asked else device_type == "cuda"

    def split_name(self, split: str) -> str:
        """Return the name of a split with its fold, which tells it from that of another fold of the set."""
        folds = {"train": f"all folds but {self.fold}", "val": f"fold {self.fold}"} if self.fold >= 0 else {}
        return folds.get(split, split)

    @property
    def eval_size_px(self) -> int:
        return self.eval_size or self.image_size

    @property
    def eval_resize_px(self) -> int:
        return self.eval_resize or round(self.eval_size_px * 8 / 7)

    @model_validator(mode="after")
    def _balances_single_images(self) -> Self:
        if self.balance and self.block > 1:
            raise ValueError(
                f"balance {self.balance:g} needs block 1, and block is {self.block}: balancing draws single images, "
                "and a block would include their neighbours"
            )
        return self

    @model_validator(mode="after")
    def _resize_covers_crop(self) -> Self:
        if 0 < self.eval_size < 16:
            raise ValueError(f"eval_size {self.eval_size} is neither 0 nor from 16 to 2048")
        if self.eval_resize and self.eval_resize < self.eval_size_px:
            side = "eval_size" if self.eval_size else "image_size"
            raise ValueError(f"eval_resize {self.eval_resize} is smaller than {side} {self.eval_size_px}")
        return self

    @model_validator(mode="after")
    def _read_fails_before_collectives_do(self) -> Self:
        if self.read_attempts * self.read_timeout_s > _MOST_PATIENCE_S:
            raise ValueError(
                f"read_attempts {self.read_attempts} x read_timeout_s {self.read_timeout_s:g} is more than "
                f"{_MOST_PATIENCE_S:g} s; the other ranks wait at most 600 s"
            )
        return self


class Augment(_Section):
    crop_scale: tuple[Fraction, Fraction] = (0.35, 1.0)
    """Smallest and largest fraction of the image's area in a random crop."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random crop."""
    horizontal_flip: Fraction = 0.5
    vertical_flip: Fraction = 0.0
    brightness: Fraction = 0.0
    """Largest relative change; the same for contrast and saturation."""
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    erase: Fraction = 0.0
    """Probability that a random rectangle of the image is replaced by the mean colour."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Random operations on each image. trivialaugment: one, of random strength; randaugment: as below."""
    policy_ops: PositiveInt = 2
    """randaugment only: operations on each image, one after another."""
    policy_strength: Fraction = 0.3
    """randaugment only: 0.3 is torchvision's magnitude 9 of 30."""
    mixup: NotNegative = 0.0
    """MixUp: alpha of the Beta distribution of the blending weight; 0: off. 0.2 is usual."""
    cutmix: NotNegative = 0.0
    """CutMix: alpha in the same sense, for a rectangle taken from another image; 0: off. 1.0 is usual. If both are on,
    each is used for half of the micro-batches."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1] or value[0] <= 0:
            raise ValueError(f"{list(value)} must be two positive numbers, the smaller first")
        return value


class Model(_Section):
    arch: str = "resnet50"
    """Name of a classifier in torchvision (resnet50, mobilenet_v3_small, convnext_tiny, ...), or timm/NAME for a
    network of timm: see docs/networks.md."""
    weights: Location = "imagenet"
    """imagenet: torchvision's default weights; none: random weights; or the path of a .safetensors or .pth file, or of
    a run. From a run, the head's rows of the classes that both have are used too. For timm/NAME a path or none."""
    mean: Rgb = (0.485, 0.456, 0.406)
    """Mean of red, green and blue in 0..1, subtracted from the images: that with which the weights were trained."""
    std: PositiveRgb = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue in 0..1, by which the images are divided then."""
    freeze: Literal["none", "stem", "layer1", "layer2", "layer3", "backbone"] = "none"
    """The network is not trained up to and including this stage. Frozen BatchNorm keeps its statistics. backbone: all
    but the head."""
    unfreeze_every_epochs: NotNegative = 0.0
    """Epochs after which the last frozen stage is also trained, then the stage before it, and so on; 0: never."""
    channels_last: bool = True
    stochastic_depth: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that an image skips the last block; smaller for earlier blocks, and 0 for the first. For ResNets,
    ConvNeXt, EfficientNet, Swin and MaxViT."""
    zero_init_residual: bool = True
    """ResNets only: initialise the last BatchNorm of each block to zero, so that each block starts as the identity."""
    sync_batchnorm: bool = False
    """Compute BatchNorm over the micro-batches of all ranks, for micro-batches of few images. GPUs only. It is slower,
    and the result depends on the number of ranks."""
    compile: bool | Literal["auto"] = "auto"
    """Use torch.compile, which takes about a minute for each image size. auto: on a GPU in bf16 or fp16, if it is
    estimated to save at least twice the time of compiling; the estimate is printed. A resumed run keeps its choice."""

    @model_validator(mode="after")
    def _freezes_what_can_be_frozen(self) -> Self:
        if self.unfreeze_every_epochs and self.freeze == "none":
            raise ValueError(f"unfreeze_every_epochs is {self.unfreeze_every_epochs:g}, but freeze is none")
        if self.freeze != "none" and self.weights == "none" and not self.unfreeze_every_epochs:
            raise ValueError(f"freeze is {self.freeze}, but weights is none: the frozen stages would stay random")
        return self


class Optimizer(_Section):
    name: Literal["sgd", "adam", "adamw", "lars", "lamb"] = "sgd"
    """lars, lamb: SGD and AdamW with updates in proportion to the norm of each layer's weights, for batches of
    thousands of images."""
    lr: Positive = 0.1
    """Peak learning rate, for the global batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD and LARS only."""
    nesterov: bool = True
    """SGD only."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam, AdamW and LAMB only."""
    weight_decay: NotNegative = 5e-5
    """Not applied to biases and normalisation layers."""
    clip_norm: NotNegative = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    adaptive_clip: NotNegative = 0.0
    """Largest norm of a unit's gradient relative to the norm of its weights; head, biases and normalisation layers are
    not clipped. 0: no clipping. 0.01 is usual, and limits the effect of one noisy batch at any scale of the loss."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning-rate multiplier from each stage to the one before it; 1: the same rate everywhere."""


class Schedule(_Section):
    name: Literal["cosine", "cosine_restarts", "step", "constant"] = "cosine"
    warmup_epochs: NotNegative = 0.0
    """Epochs in which the learning rate grows linearly from 1 % of the peak."""
    final_fraction: Fraction = 0.0
    """Both cosines: final learning rate as a fraction of the peak."""
    cycle_epochs: PositiveInt = 10
    """cosine_restarts only: epochs of the first cycle, after the warm-up."""
    cycle_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """cosine_restarts only: length of each cycle as a multiple of the cycle before it."""
    start_size: Count = 0
    """Progressive sizes: side of the images in the first epoch, px; it grows in steps of 16. 0: always
    data.image_size."""
    full_size_at: Fraction = 0.75
    """Progressive sizes: fraction of the epochs after which the side is data.image_size."""
    step_epochs: PositiveInt = 30
    """step only: epochs between two reductions of the learning rate."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """step only: factor of each reduction."""


class Train(_Section):
    epochs: PositiveInt = 90
    batch_size: PositiveInt = 256
    """The global batch: images in a step, over all processes and micro-batches."""
    max_micro_batch: Count = 64
    """Largest micro-batch of one process; it determines the number of accumulation steps. 0: as many images as fit,
    tried once in a run; BatchNorm's groups, and so the result, then depend on the machine."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weighting: Literal["none", "inverse_frequency", "effective_number"] = "none"
    """Weight in the loss of an image of a class with n images: 1 / n (inverse_frequency), or (1 - b) / (1 - b^n) with
    b = 0.999 (effective_number), which is nearly equal for classes of thousands of images. The weights are scaled so
    that their mean over the training images is 1."""
    early_stop_epochs: Count = 0
    """Stop after this many evaluations in a row without an improvement; 0: never."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the weights; evaluations, the best checkpoint and the exported model
    then use the average. 0: off. 0.999 averages over about 1,000 steps; fewer at the beginning."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    focal_gamma: NotNegative = 2.0
    """focal only: the larger, the less well-classified images count; 0: cross-entropy."""
    logit_adjustment: NotNegative = 0.0
    """tau: training adds tau * ln(fraction of the class) to each logit, so that rare classes get larger logits in
    prediction. 1: compensates for the imbalance; 0: off. The fractions are those of the drawn images, so with
    data.balance 1 it has no effect."""
    teacher: Location = ""
    """Knowledge distillation: folder of a run or model with the same classes. The network also learns the teacher's
    outputs for the augmented images. Empty: off. The teacher's architecture may differ; its calibration is not used. It
    sees the images of this run, so it should have learned at their size."""
    teacher_weight: Fraction = 0.5
    """Fraction of the loss that is the distance from the teacher's outputs; the rest is the loss of the labels."""
    teacher_temperature: Positive = 2.0
    """Divides the logits of both networks in the distillation loss: the higher, the more unlikely classes count."""
    log_every_steps: PositiveInt = 10
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """What to do if the loss or the gradient is not finite, or the loss explodes. stop: the run ends; skip: such a step
    changes nothing; rollback: the run continues from the newest checkpoint with a smaller learning rate. skip checks
    each step; stop and rollback check each row of metrics."""
    exploding_loss: NotNegative = 20.0
    """A loss above this many times ln(classes), the loss of a random guess, has exploded; 0: only a loss that is not
    finite has."""
    max_skipped_in_a_row: PositiveInt = 10
    """skip only: the run stops after this many skipped steps in a row."""
    max_rollbacks: PositiveInt = 3
    """rollback only: largest number of rollbacks; the next divergence stops the run."""
    rollback_lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """rollback only: each rollback multiplies all later learning rates by this factor."""
    stop_at_step: Count = 0
    """Stop after this step, keeping the schedule of all epochs; 0: never."""


class Evaluate(_Section):
    every_steps: Count = 0
    """Optimizer steps between evaluations; 0: after every epoch."""
    batch_size: PositiveInt = 64
    """Images in an evaluation batch of one process."""
    metric: Literal["accuracy", "macro_recall", "macro_f1"] = "accuracy"
    """Metric that selects the best checkpoint."""


class Checkpoint(_Section):
    every_steps: Count = 0
    """Optimizer steps between checkpoints, in addition to the one at each evaluation; 0: only at evaluations."""
    every_minutes: NotNegative = 0.0
    """Minutes since the last checkpoint after which one is saved, even if no step requires it; 0: never."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints kept, in addition to the best."""
    keep_every: Count = 0
    """Keep permanently the first checkpoint in each interval of this many optimizer steps; 0: none."""


class Ddp(_Section):
    """How gradients are sent between processes; measurements are in launch/README.md."""

    compression: Literal["none", "bf16"] = "none"
    """bf16: half the bytes; gradients are rounded to 8 significant bits before they are averaged."""
    static_graph: bool = False
    """DDP's static_graph: all steps have the same graph, so DDP plans its messages once. Not with accumulation."""
    bucket_mb: PositiveInt = 25
    """Gradients sent in one message, MiB, while the backward pass computes the next ones."""


class Track(_Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if there is an API key and the server answers, else offline; WANDB_MODE takes precedence over auto.
    There is never a prompt."""
    project: str = "wasteddp"
    tensorboard: bool = False
    """Write TensorBoard events to RUN/tensorboard, in addition to metrics.jsonl; needs the extra `tensorboard`."""
    entity: str = ""
    """User or team on W&B; empty: the default of the API key."""
    group: str = ""
    """W&B shows the runs of a group together, such as the seeds of an experiment."""
    job_type: str = "train"
    tags: tuple[str, ...] = ()
    images: Count = 16
    """Images in each gallery: augmented images at the start, the most confident mistakes at each evaluation."""
    model: bool = True
    """Upload the best model to W&B at the end of the run, as an artifact."""
    finish_s: Positive = 30.0
    """Longest wait for W&B at the end of a run, s; keep it below the scheduler's time between signal and kill."""


class Profile(_Section):
    steps: Count = 0
    """Number of steps to profile; a trace and verdict.txt are written to RUN/profile. 0: none. Profiling slows them."""
    skip: Count = 5
    """Steps after the start of the process before profiling begins, since the first steps include warm-up."""


class Settings(_Section):
    """All settings of a run. Sections may be left out; unknown keys are refused."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: on a GPU fp16 if it is measured to be at least 5 % faster than bf16, else bf16; on a CPU bf16 where the
    hardware computes it, else fp32. A resumed run keeps its precision."""
    run: Run = Run()
    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    ddp: Ddp = Ddp()
    track: Track = Track()
    profile: Profile = Profile()

    @model_validator(mode="after")
    def _possible_together(self) -> Self:
        if self.schedule.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} is not below train.epochs {self.train.epochs}"
            )
        if self.data.lanes and self.train.batch_size % self.data.lanes:
            raise ValueError(f"data.lanes {self.data.lanes} does not divide train.batch_size {self.train.batch_size}")
        if self.schedule.start_size and not 16 <= self.schedule.start_size <= self.data.image_size:
            raise ValueError(
                f"schedule.start_size {self.schedule.start_size} is not from 16 to data.image_size "
                f"{self.data.image_size}"
            )
        self._refuse_two_remedies_for_imbalance()
        out = Path(self.run.out).resolve()
        if self.train.teacher and Path(self.train.teacher).resolve() in (out, out / "model"):
            raise ValueError(
                f"train.teacher {self.train.teacher} is the model of this run, which changes during training"
            )
        if self.schedule.start_size % 16:
            raise ValueError(f"schedule.start_size {self.schedule.start_size} is not a multiple of 16")
        return self

    def _refuse_two_remedies_for_imbalance(self) -> None:
        """Refuse class weights with logit adjustment or balance: both would raise the logits of rare classes.

        Logit adjustment and balance may be combined, since the adjustment uses the fractions that are really drawn.
        """
        train = self.train
        remedies = {"train.logit_adjustment": train.logit_adjustment, "data.balance": self.data.balance}
        for name, value in remedies.items():
            if value and train.class_weighting != "none":
                raise ValueError(
                    f"train.class_weighting {train.class_weighting} and {name} {value:g} would compensate for "
                    "the imbalance of the classes twice: set only one of them"
                )

    @property
    def num_lanes(self) -> int:
        return self.data.lanes or self.train.batch_size

    def to_yaml(self) -> str:
        """Return every setting, including defaults, as YAML that `parse` reads back to equal settings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
