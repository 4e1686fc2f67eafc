"""A hash of a tensor's bits: whether it is what it was, to the last bit and in every place."""

import hashlib

import torch
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bits in their order, with dtype and shape.

    `torch.hash_tensor` combines elements with XOR: it sees neither their order nor a change of an even number
    of equal ones, such as a layer of zeros that all became the same.
    """
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found.update(plain.numpy().data)
    return found.hexdigest()
