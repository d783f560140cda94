"""Where the layers of a checkpoint go in one of transformers' models, and back.

transformers renames, stacks and joins a checkpoint's tensors by conversions that it knows for each model. They are not repeated here: numbers of
rows are sent through them, and where these come out the rows of the quantized weights belong.
"""

import copy
import math
import re
from dataclasses import dataclass, field

import torch

from ref.combine import fuse, stack, take_expert, take_rows


@dataclass
class Group:
    """Layers of a checkpoint that make up one or more parameters of a model together.

    keys: the parameters. converter: transformers' conversion, or None where there is one layer, and it is the parameter.
    members: (layer, name after renaming, the conversion's pattern) of each.
    """

    keys: list
    converter: object
    members: list = field(default_factory=list)

    layers = property(lambda self: [layer for layer, _, _ in self.members])


class Names:
    """transformers' conversions for one model.

    parameters: {name: tensor} of the model as it was when this was made, on the meta device.
    """

    def __init__(self, model):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self.model, self.parameters = model, model.state_dict()
        self._transforms = get_model_conversion_mapping(model)
        self._renamings, self._converters = _sorted(self._transforms, WeightRenaming)

    def parameter(self, name):
        """What transformers calls a tensor of a checkpoint in the model, and the pattern of its conversion or None."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        key, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self.parameters)
        if key not in self.parameters and name in self.parameters:
            return name, None
        return key, pattern

    def groups(self, layers):
        """The Groups of quantized layers, and the layers that belong to no parameter of the model.

        Raises:
            ValueError: two layers for one parameter, or experts that are missing; the message names them.
        """
        found, left = {}, []
        for layer in layers:
            # A layer is a module with a weight, or, as GPT-OSS's experts are stored, the parameter itself.
            tried = ((name, *self.parameter(name)) for name in (f"{layer}.weight", layer))
            name, key, pattern = next((t for t in tried if t[1] in self.parameters), (None, None, None))
            if key is None:
                left.append(layer)
                continue
            if key not in found:
                found[key] = Group(*self._targets(key, pattern))
            elif pattern is None:
                raise ValueError(f"{found[key].layers[0]} and {layer} are both {key}; expected one")
            found[key].members.append((layer, name, pattern))
        for key, group in found.items():
            self._whole(key, group)
        return list(found.values()), left

    def _targets(self, key, pattern):
        """The parameters that come of a conversion, and the conversion."""
        if pattern is None:
            return [key], None
        converter = copy.deepcopy(next(c for c in self._converters if pattern in c.source_patterns))
        first, *others = converter.target_patterns
        return [key, *(key.replace(first, other) for other in others)], converter

    def _whole(self, key, group):
        """Refuse a stack that lacks experts, or has more than the model."""
        if group.converter is None or not any("*" in pattern for pattern in group.converter.source_patterns):
            return
        experts = len(self.parameters[key])
        for pattern in group.converter.source_patterns:
            number = re.compile(pattern.replace("*", r"(\d+)"))
            names = {int(number.search(name)[1]): name for _, name, of in group.members if of == pattern}
            missing = sorted(set(range(experts)) - set(names))
            if missing:
                example = pattern.replace("*", str(missing[0]))
                raise ValueError(f"{key}: the model has {experts} experts, and the checkpoint lacks {len(missing)} of {pattern}: {example}")
            if len(names) > experts:
                raise ValueError(f"{key}: the model has {experts} experts, and the checkpoint {len(names)}: {names[max(names)]}")

    def read(self, group, checkpoint):
        """{parameter: QTensor} of a Group.

        Args:
            checkpoint: what has a QTensor for each layer.

        Raises:
            ValueError: layers that cannot be joined. NotImplementedError: a stack that is converted.
        """
        qs = [checkpoint[layer] for layer in group.layers]
        if group.converter is None:
            return {group.keys[0]: qs[0]}
        if any(len(q.shape) != 2 for q in qs):
            raise NotImplementedError(f"{group.layers[0]} is a stack that {group.converter!r} would take apart; only weights (n, k) can be")
        converter, start = copy.deepcopy(group.converter), 0
        for (_, name, pattern), q in zip(group.members, qs, strict=True):
            other = next(p for p, (_, _, of) in zip(qs, group.members, strict=True) if of == pattern)
            if tuple(q.shape) != tuple(other.shape):
                raise ValueError(f"{name} has shape {tuple(q.shape)}, and the first of {pattern} {tuple(other.shape)} (all must match)")
            converter.add_tensor(group.keys[0], name, pattern, torch.arange(start, start + q.shape[0]).unsqueeze(1))
            start += q.shape[0]
        made = converter.convert(group.keys[0], model=self.model, config=self.model.config)
        return {key: gather(qs, rows[0] if isinstance(rows, list) else rows) for key, rows in made.items()}

    def write(self, key, q):
        """{layer: QTensor} of a parameter's weight (n, k) or (e, n, k), as the model's checkpoints store it: the inverse of read."""
        from transformers.core_model_loading import WeightRenaming, apply_converters

        # The last conversion is reverted first.
        _, converters = _sorted([transform.reverse_transform() for transform in reversed(self._transforms)], WeightRenaming)
        name, pattern = apply_converters(key, converters)
        if pattern is None:
            return {key.removesuffix(".weight"): q}
        converter = copy.deepcopy(next(c for c in converters if pattern in c.source_patterns))
        rows = torch.arange(math.prod(q.shape[:-1])).view(*q.shape[:-1], 1)
        converter.add_tensor(name, key, pattern, rows)
        made = converter.convert(name, model=self.model, config=self.model.config)
        return {name.removesuffix(".weight"): _taken(q, rows[0] if isinstance(rows, list) else rows) for name, rows in made.items()}

    def stored(self, names):
        """{name: what transformers calls it in a checkpoint that it saves}; conversions, which write has done, aside."""
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings, _ = _sorted([transform.reverse_transform() for transform in reversed(self._transforms)], WeightRenaming)
        return {name: apply_renamings(name + ".", renamings).removesuffix(".") for name in names}


def gather(qs, rows):
    """The rows of weights (n, k), counted through all of them, as one weight; or as a stack of as many as rows has planes.

    Args:
        qs: QTensors. rows: int64 with n values, or (e, ...) with e n values.
    """
    if rows.dim() == 3:
        return stack([gather(qs, plane) for plane in rows])
    rows = rows.flatten()
    ends = torch.tensor([q.shape[0] for q in qs]).cumsum(0)
    owner = torch.bucketize(rows, ends, right=True)
    chosen = list(dict.fromkeys(owner.unique_consecutive().tolist()))
    q = fuse([qs[i] for i in chosen])
    # Where the rows of the chosen begin now, less where they began among all.
    lengths = torch.tensor([qs[i].shape[0] for i in chosen])
    shift = torch.zeros(len(qs), dtype=torch.long)
    shift[chosen] = (lengths.cumsum(0) - lengths) - (ends[chosen] - lengths)
    index = rows + shift[owner]
    return q if torch.equal(index, torch.arange(q.shape[0])) else take_rows(q, index)


def _taken(q, rows):
    """Rows of one weight, or of one expert of a stack whose rows are counted through."""
    rows = rows.flatten()
    if len(q.shape) == 2:
        return take_rows(q, rows)
    expert = int(rows[0]) // q.shape[1]
    return take_rows(take_expert(q, expert), rows - expert * q.shape[1])


def _sorted(transforms, renaming):
    """Those that only rename, and those that convert."""
    return [t for t in transforms if isinstance(t, renaming)], [t for t in transforms if not isinstance(t, renaming)]
