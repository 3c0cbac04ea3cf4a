"""The configuration of a run: dataclasses are the schema, YAML files the values, `key=value` the last word."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.config import DataConfig
from model.config import ModelConfig

GRADIENTS = ("full", "detached")
RECOMPUTE = ("none", "selective", "layer", "window")
SCHEDULES = ("segment_1f1b", "1f1b")
PRECISIONS = ("fp32", "bf16", "fp64")
STOP_SIGNALS = ("USR1", "USR2", "HUP", "ALRM")
SPIKE_ACTIONS = ("none", "warn", "skip", "rollback")
WANDB_MODES = ("online", "offline")
LR_SCHEDULES = ("cosine", "wsd", "linear", "constant")


@dataclass
class ParallelConfig:
    """How the processes are laid out. Data parallelism takes what tensor, context and pipeline leave."""

    tensor: int = 1
    """Ranks that share every layer (its heads, its MLP, the vocabulary)."""
    context: int = 1
    """Ranks that share the segments of every chunk of a window; only the memory's summaries cross between them.
    Must divide the segments of a chunk."""
    pipeline: int = 1
    """Stages that share the layers."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 1 or 2 everywhere, 3 without pipeline stages."""
    sequence_parallel: bool = False
    """Split the norms (and what is between the matrices) along the sequence over the tensor-parallel ranks."""
    layers_per_stage: list[int] | None = None
    """Layers of each pipeline stage, first to last; null splits them as evenly as possible."""
    schedule: str = "segment_1f1b"
    """`segment_1f1b` moves chunks of a window through the stages, `1f1b` whole windows."""
    timeout_s: float = 1800.0
    """A collective that waits longer than this ends the run. The last resort: resilience.hang_timeout_s speaks sooner,
    and says more."""


@dataclass
class BpttConfig:
    """Backpropagation through time, inside one window."""

    gradient: str = "full"
    """`full`: through the memory inside the window. `detached`: the memory is read without gradient."""
    chunks_per_window: int = 1
    """Units of the pipeline schedule in a window; must divide train.segments_per_window."""
    recompute: str = "none"
    """`none`; `selective` recomputes attention, `layer` whole layers, `window` whole chunks from their memory."""
    recompute_logits: bool | None = None
    """Make the logits again in the backward pass, 2,048 tokens at a time, instead of keeping those of every chunk in
    flight: a third more work in the output matrix. null does so where they would take more than 1 GiB of a rank."""


@dataclass
class OptimizerConfig:
    """AdamW. Weight decay applies to matrices only; beta and the write gate are groups of their own."""

    lr: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of AdamW's first and second moment."""
    eps: float = 1e-8
    """What AdamW adds to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; of matrices."""
    clip: float = 1.0
    """Global gradient norm; 0 turns clipping off."""
    beta_lr_scale: float = 10.0
    """Learning rate of beta (the memory's share, per head or per token) relative to lr."""
    write_gate_lr_scale: float = 3.0
    """Learning rate of the write gate, and of what a rule decays by, relative to lr."""
    schedule: str = "cosine"
    """After the warm-up: `cosine` and `linear` fall to the end, `wsd` stays and falls at the end, `constant` stays."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Length of the final decay of `wsd`; null means a fifth of the steps."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, relative to lr."""


@dataclass
class TrainConfig:
    steps: int = 1000
    """Length of the run; the learning-rate schedule ends here."""
    lanes: int = 8
    """G: rows of the global batch, fixed for the life of a run."""
    lanes_per_microbatch: int | None = None
    """Lanes that one pass through a stage handles; null means all lanes of a data-parallel rank without pipeline
    stages, and one otherwise."""
    segments_per_window: int = 8
    """T: segments that one step takes from every lane."""
    probes_per_window: int = 0
    """P: read-only segments per lane and step that ask a question of the memory (documents with questions only). They
    are spread evenly: segments_per_window must be a multiple, and P one of bptt.chunks_per_window."""
    seed: int = 0
    """Of the initial weights and of the order of the documents."""
    precision: str = "fp32"
    """`bf16` keeps float32 masters and a float32 memory; `fp64` is for parity tests."""
    write_gate_penalty: float = 0.0
    """Weight of the mean write gate in the loss."""
    write_gate_penalty_from: int = 0
    """First step with that penalty: before there is anything to keep it only closes the gates."""
    init_from: str | None = None
    """Run folder or checkpoint (an imported model, an earlier phase) whose weights a new run starts from: fresh
    optimizer, step 0, empty memory. Resuming does not look at it."""
    freeze_backbone_steps: int = 0
    """So many steps train the memory's parameters only; what the plain model has does not move."""
    trainable: list[str] = field(default_factory=list)
    """Patterns (`*` and `?`) of the names of parameters to train, such as `*.beta`; empty trains all."""
    max_nonfinite_steps: int = 5
    """So many skipped steps in a row end the run."""


@dataclass
class CheckpointConfig:
    interval: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep, for good, every checkpoint whose step is a multiple of this; 0 keeps none."""
    asynchronous: bool = True
    """Write behind the training: a step waits only for the copy to host memory. One save is in flight at a time."""
    attempts: int = 3
    """Failed saves in a row that end the run; before that each is reported and tried again."""
    store: str | None = None
    """Folder of an object store, such as `s3://bucket/runs/${name}`, where every checkpoint is copied behind the
    training; null copies none. A run goes on from there where its own folder has nothing newer."""


@dataclass
class ProfileConfig:
    """A few steps in `torch.profiler`: a trace per rank in the run folder's `profile/`, for Perfetto or TensorBoard."""

    start: int | None = None
    """First step in the trace (the step before it warms the profiler up); null makes none."""
    steps: int = 3
    """Steps in the trace. They do not count in the run's tokens per second."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that write one."""


@dataclass
class WandbConfig:
    """Weights & Biases beside TensorBoard (`pip install infini-pretrain[wandb]`)."""

    project: str | None = None
    """Name of the project; null leaves W&B out."""
    entity: str | None = None
    """User or team; null takes the default of the account."""
    group: str | None = None
    """What the run is shown together with."""
    mode: str = "online"
    """`online` sends while training; `offline` writes `wandb/` in the run folder, for `wandb sync`."""


@dataclass
class MetricsConfig:
    interval: int = 10
    """Steps between console lines and scalar metrics."""
    memory_interval: int = 100
    """Steps between the per-layer memory statistics (gate histograms, norms, shares)."""
    tensorboard: bool = True
    """Write `tensorboard/` in the run folder, beside `metrics.jsonl`."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    straggler_bound: float = 1.25
    """A rank that itself works more than so many times what the others of its pipeline stage do (their median) is
    named, with its host."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass
class ResilienceConfig:
    """Leaving well, dying well, and numbers that go wrong."""

    stop_signal: str = "USR1"
    """Besides TERM and INT: all ranks finish the step, save and exit with 85. Configurable: libraries use signals."""
    stop_file: str = "stop"
    """The same when a file of this name appears in the run folder (it is removed)."""
    max_minutes: float | None = None
    """The same after so many minutes: set it below the scheduler's time limit."""
    hang_timeout_s: float = 300.0
    """No progress for so long (not one operation of the schedule): every thread's stack is written, the late ranks are
    named, and the run ends; 0 is off. Until the first step is done, and while a checkpoint is read or written, it is
    nine tenths of parallel.timeout_s."""
    spike_action: str = "warn"
    """What a loss spike does: `none`, `warn`, `skip` (that step only) or `rollback` (to the last checkpoint, with the
    lanes moved past the offending window)."""
    spike_threshold: float = 8.0
    """Robust z-score of the loss over the recent steps that counts as a spike."""
    spike_window: int = 100
    """Recent steps that a loss is compared with; no spike is seen in the first tenth of them."""
    max_rollbacks: int = 3
    """So many roll-backs without a new checkpoint in between end the run."""


@dataclass
class PasskeyRowConfig:
    """Some lengths of the passkey grid."""

    lengths: list[int] = field(default_factory=list)
    """Lengths of the documents in tokens, cut to whole segments."""
    depths: list[float] = field(default_factory=lambda: [0.05, 0.5, 0.95])
    """Where the key stands, from 0 (beginning) to 1 (end)."""
    documents: int = 20
    """Documents per length, depth and seed."""
    seeds: int = 1
    """Seeds: evaluate.seed and those after it."""


@dataclass
class EvaluateConfig:
    """What `infini evaluate` measures, and how a run evaluates itself on the way (docs/evaluation.md)."""

    interval: int | None = None
    """Steps between evaluations inside the training run; null is never. There is one more behind the last step, and one
    before the first where train.init_from gives the weights. They measure the loss of `documents`, and
    `interval_tasks`: no passkey grid."""
    interval_tasks: list[str] | None = None
    """Tasks of the evaluations inside the training run, such as `passkey:8,length=2K,depth=0.5`; null is `tasks`."""
    documents: int = 16
    """Held-out documents for the loss by segment index; 0 leaves it out."""
    max_segments: int = 32
    """Segments per held-out document."""
    reset_every: int | None = None
    """A further control of the held-out loss: the memory is emptied before every so many segments (those of a training
    window, for instance: what older memory is worth); null leaves it out."""
    passkey_lengths: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    """Lengths of the passkey documents, in segments."""
    passkey_depths: list[float] = field(default_factory=lambda: [0.05, 0.5, 0.95])
    """Where the key stands, from 0 (beginning) to 1 (end)."""
    passkey_documents: int = 20
    """Documents per cell."""
    passkey_grid: list[PasskeyRowConfig] = field(default_factory=list)
    """Rows of a larger grid, in place of the three settings above."""
    tasks: list[str] = field(default_factory=list)
    """Synthetic tasks, such as `recall:50,length=1K,pairs=4/8/16/32` (docs/synthetic_data.md)."""
    seed: int = 1234
    """Of the documents that are made or chosen."""


@dataclass
class Config:
    name: str = "run"
    """Name of the run; `run_dir` has it."""
    run_dir: str = "runs/${name}"
    """Folder of the run: checkpoints, metrics, configuration. On a cluster every node must see it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    bptt: BpttConfig = field(default_factory=BpttConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
