"""Safe generators: each sample exactly once and with its own random numbers, killed and resumed.

What is random in a sample is a function of (seed, epoch, index), and the place in an epoch is
counted in samples delivered. So neither the workers, nor the ranks, nor a kill changes a run.

Source: Su Jianlin, article 6575 (https://kexue.fm/archives/6575), 2019, section 3.
"""

from cln_tutorial.safe_generators.loader import SafeLoader, SkippedSample
from cln_tutorial.safe_generators.permutation import epoch_order
from cln_tutorial.safe_generators.processes import (
    ForkSafetyReport,
    PerProcess,
    fork_safety_report,
)
from cln_tutorial.safe_generators.sampling import EpochSampler
from cln_tutorial.safe_generators.sharding import ShardedIterable
from cln_tutorial.safe_generators.streams import SampleKey, SeededDataset, sample_generator
from cln_tutorial.safe_generators.threads import threadsafe
from cln_tutorial.safe_generators.workers import WorkerDied, WorkerTimeout

__all__ = [
    "EpochSampler",
    "ForkSafetyReport",
    "PerProcess",
    "SafeLoader",
    "SampleKey",
    "SeededDataset",
    "ShardedIterable",
    "SkippedSample",
    "WorkerDied",
    "WorkerTimeout",
    "epoch_order",
    "fork_safety_report",
    "sample_generator",
    "threadsafe",
]
