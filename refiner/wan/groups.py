"""Groups of tensors in a file: nested dictionaries, and names that a flat file has flattened them
to."""

from collections.abc import Iterator, Mapping

from torch import Tensor

FLAT = "flat"  # the name of the group when tensors lie at the top of the file
DEEPEST = 4  # dictionaries inside one another that are searched
MOST_GROUPS = 256  # an optimizer's state may hold thousands
EMA_ROLES = ("generator_ema", "model_ema", "ema_model", "ema")
RAW_ROLES = ("generator", "student", "model", "state_dict", FLAT, "generator_lora")
# Networks that training keeps beside the generator, in the same architecture.
OTHER_ROLES = (
    "critic", "critic_ema", "critic_lora", "fake_score", "fake_model", "real_score", "real_model", "teacher",
    "discriminator", "guidance_model",
)  # fmt: skip
SPLIT_ROLES = (*EMA_ROLES, "generator", "student", "generator_lora", *OTHER_ROLES)
# Attributes that hold the network in trainers, pipelines and other software; they say nothing of
# what it is.
WRAPPERS = (
    "model", "module", "net", "network", "transformer", "diffusion_model", "base_model", "dit", "unet", "pipe",
    "pipeline", "state_dict", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
)  # fmt: skip
REMOVED = frozenset((*WRAPPERS, *EMA_ROLES, "generator", "student", "generator_lora"))
SKIPPED = ("optim", "sched")  # parts of names of dictionaries that hold no network

Groups = dict[str, dict[str, Tensor]]


def group_tensors(content: Mapping) -> tuple[Groups, tuple[str, ...]]:
    """(groups of tensors by dotted path, top keys that hold none) of a dictionary, which may nest
    others."""
    groups: Groups = {}
    used = set()
    for path, tensors in _walk(content, (), DEEPEST, {}):
        groups[".".join(path) or FLAT] = tensors
        used |= set(path[:1]) or set(tensors)
        if len(groups) == MOST_GROUPS:
            break
    if FLAT in groups:
        groups[FLAT] = groups.pop(FLAT)  # the last, as it may hold odd ends
    return split_roles(groups), tuple(str(key) for key in content if str(key) not in used)


def _walk(
    content: Mapping, path: tuple[str, ...], depth: int, seen: dict[int, dict[str, Tensor]]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Dictionaries that hold tensors, outer ones first, with the keys that lead to them.

    One that is met again, as in a dictionary that holds itself, is not searched again.
    """
    again = id(content) in seen
    if not again:
        named = ((name, value) for name, value in content.items() if isinstance(name, str))
        seen[id(content)] = {
            name: value.detach() for name, value in named if isinstance(value, Tensor)
        }
    if seen[id(content)]:
        yield path, seen[id(content)]
    if again or not depth:
        return
    for key, value in content.items():
        name = str(key)
        if isinstance(value, Mapping) and not any(part in name.lower() for part in SKIPPED):
            yield from _walk(value, (*path, name), depth - 1, seen)


def split_roles(groups: Groups) -> Groups:
    """Move tensors whose names begin with a role, as `generator_ema.model.`, to a group of that
    role.

    Names stay as stored.
    """
    split: Groups = {}
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            role = _role_prefix(name)
            key = group if role is None else role if group == FLAT else f"{group}.{role}"
            split.setdefault(key, {})[name] = tensor
    return split


def _role_prefix(name: str) -> str | None:
    """The start of a name up to a role, where only wrappers come before it."""
    parts = name.split(".")[:-1]
    for number, part in enumerate(parts):
        if part in SPLIT_ROLES:
            return ".".join(parts[: number + 1])
        if part not in WRAPPERS:
            return None
    return None


def role_of(group: str) -> str:
    """What a group is in its training: the most telling key of its path, or the path itself."""
    keys = group.split(".")
    ranked = (*OTHER_ROLES, *EMA_ROLES, *RAW_ROLES)
    return next((role for role in ranked if role in keys), group)
