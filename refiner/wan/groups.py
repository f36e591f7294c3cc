"""Groups of tensors in a file, from nested dictionaries or from prefixes of flat names."""

from collections.abc import Iterator, Mapping

from torch import Tensor

FLAT = "flat"  # name of the group of tensors at the top of the file
DEEPEST = 4  # levels of nested dictionaries that are searched
MOST_GROUPS = 256  # an optimizer's state may hold thousands
EMA_ROLES = ("generator_ema", "model_ema", "ema_model", "ema")
RAW_ROLES = ("generator", "student", "model", "state_dict", FLAT, "generator_lora")
# Networks of the same architecture that training saves beside the generator.
OTHER_ROLES = (
    "critic", "critic_ema", "critic_lora", "fake_score", "fake_model", "real_score", "real_model",
    "teacher", "discriminator", "guidance_model",
)  # fmt: skip
SPLIT_ROLES = (*EMA_ROLES, "generator", "student", "generator_lora", *OTHER_ROLES)
# Attribute names under which trainers and pipelines store a network, whatever its role.
WRAPPERS = (
    "model", "module", "net", "network", "transformer", "diffusion_model", "base_model", "dit",
    "unet", "pipe", "pipeline", "state_dict", "_orig_mod", "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # fmt: skip
REMOVED = frozenset((*WRAPPERS, *EMA_ROLES, "generator", "student", "generator_lora"))
SKIPPED = ("optim", "sched")  # dictionaries with these in their names hold no network

Groups = dict[str, dict[str, Tensor]]


def group_tensors(content: Mapping) -> tuple[Groups, tuple[str, ...]]:
    """Return the groups of tensors in a nested dictionary, and the top keys without any.

    Groups are named by the dotted path of keys that leads to them.
    """
    groups: Groups = {}
    used = set()
    for path, tensors in _walk(content, (), DEEPEST, {}):
        groups[".".join(path) or FLAT] = tensors
        used |= set(path[:1]) or set(tensors)
        if len(groups) == MOST_GROUPS:
            break
    if FLAT in groups:
        groups[FLAT] = groups.pop(FLAT)  # last, as it may hold stray tensors
    return split_roles(groups), tuple(str(key) for key in content if str(key) not in used)


def _walk(
    content: Mapping, path: tuple[str, ...], depth: int, seen: dict[int, dict[str, Tensor]]
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the tensors of each dictionary that has some, outer ones first, with its path.

    A dictionary that occurs again, perhaps inside itself, is not searched again.
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
        if isinstance(value, Mapping) and not any(word in name.lower() for word in SKIPPED):
            yield from _walk(value, (*path, name), depth - 1, seen)


def split_roles(groups: Groups) -> Groups:
    """Move tensors with a role in their prefix, like `generator_ema.model.`, to its own group.

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
    """Return the prefix of a name up to its role; None unless only wrappers come before it."""
    keys = name.split(".")[:-1]
    for number, key in enumerate(keys):
        if key in SPLIT_ROLES:
            return ".".join(keys[: number + 1])
        if key not in WRAPPERS:
            return None
    return None


def role_of(group: str) -> str:
    """Return a group's role in training: the most specific role in its path, else the path."""
    keys = group.split(".")
    ranked = (*OTHER_ROLES, *EMA_ROLES, *RAW_ROLES)
    return next((role for role in ranked if role in keys), group)
