"""The nodes of the pack, and the page's requests that it answers."""

from collections.abc import Callable, Mapping

from .accelerate import AccelerateARVDM
from .cache import ReflectiveCacheNode
from .cache_view import cache_view
from .chunk_schedule import ChunkScheduleNode
from .compare import CompareVideos
from .custom_sampler import PathwiseRefinedCustomSampler
from .decode import DecodeChunks, DecodeToVideo
from .load import LoadARVDM, LoadDemo
from .prompt_timeline import PromptTimeline
from .refiner import LoadRefiner, SaveRefiner
from .rewards import LoadReward, ScoreVideo
from .sampler import PathwiseRefinedSampler
from .search import SearchByReward
from .timeline_edit import edit_timeline
from .train import TrainRefiner

NODES = (
    LoadARVDM,
    LoadDemo,
    AccelerateARVDM,
    LoadRefiner,
    SaveRefiner,
    ReflectiveCacheNode,
    ChunkScheduleNode,
    PromptTimeline,
    PathwiseRefinedSampler,
    PathwiseRefinedCustomSampler,
    DecodeChunks,
    DecodeToVideo,
    CompareVideos,
    TrainRefiner,
    LoadReward,
    SearchByReward,
    ScoreVideo,
)

# Functions of a request's parsed JSON, by the request's name under /autorefiner/.
ANSWERS: Mapping[str, Callable[[object], dict]] = {
    "cache": cache_view,
    "timeline": edit_timeline,
}
