"""Every node of the pack."""

from .cache import ReflectiveCacheNode
from .chunk_schedule import ChunkScheduleNode
from .compare import CompareVideos
from .custom_sampler import PathwiseRefinedCustomSampler
from .decode import DecodeChunks, DecodeToVideo
from .load import LoadARVDM, LoadDemo
from .refiner import LoadRefiner, SaveRefiner
from .rewards import LoadReward, ScoreVideo
from .sampler import PathwiseRefinedSampler
from .train import TrainRefiner

NODES = (
    LoadARVDM,
    LoadDemo,
    LoadRefiner,
    SaveRefiner,
    ReflectiveCacheNode,
    ChunkScheduleNode,
    PathwiseRefinedSampler,
    PathwiseRefinedCustomSampler,
    DecodeChunks,
    DecodeToVideo,
    CompareVideos,
    TrainRefiner,
    LoadReward,
    ScoreVideo,
)
