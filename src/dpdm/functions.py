"""Operations that the network uses by a name of their own, so that the DP-SGD engine can give them a faster rule."""

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function


def group_norm_silu(input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns silu(group_norm(input)), of input's shape, (N, C, *); arguments as of F.group_norm."""
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(group_norm_silu, (input, weight, bias), input, num_groups, weight, bias, eps)
    return F.silu(F.group_norm(input, num_groups, weight, bias, eps))
