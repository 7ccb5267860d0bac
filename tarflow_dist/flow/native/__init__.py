"""A block's transformer on a CPU: all of its layers in one call of transformer.cpp."""

import ctypes

import torch
from torch import Tensor, nn

from tarflow_dist.flow.block import FlowBlock
from tarflow_dist.flow.native.build import library
from tarflow_dist.flow.transformer import TransformerLayer


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("ins", ctypes.c_int32),
        ("outs", ctypes.c_int32),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", _Norm),
        ("qkv", _Linear),
        ("proj", _Linear),
        ("mlp_norm", _Norm),
        ("up", _Linear),
        ("down", _Linear),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class _Transformer(ctypes.Structure):
    _fields_ = (
        ("input", _Linear),
        ("output", _Linear),
        ("positions", ctypes.c_void_p),
        ("classes", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        ("num_layers", ctypes.c_int32),
    )


class _Tokens(ctypes.Structure):
    _fields_ = (
        ("batch", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("num_patches", ctypes.c_int32),
        ("place", ctypes.c_void_p),
        ("logit_scale", ctypes.c_void_p),
    )


def can_run(block: FlowBlock) -> bool:
    """Whether `NativeTransformer` takes it: float32, on a CPU that the kernel is compiled for."""
    fits = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in block.parameters())
    return fits and library() is not None


class NativeTransformer:
    """The `flow.kv_cache.CachedTransformer` of a float32 model on a CPU. It has a copy of the
    matrices, so the weights must stay as they are."""

    def __init__(
        self, block: FlowBlock, condition: Tensor | None, rows: int, temperature: Tensor | None
    ):
        found = library()
        assert found is not None
        self._library = found
        self._threads = torch.get_num_threads()
        self._pointed_at: list[Tensor] = []
        layers = [self._layer(layer) for layer in block.attn_blocks]
        self._layers = (_Layer * len(layers))(*layers)
        self._transformer = _Transformer(
            input=self._linear(block.proj_in),
            output=self._linear(block.proj_out),
            positions=self._keep(block.permuted_positions()),
            layers=self._layers,
            num_layers=len(layers),
        )
        num_patches, width = block.pos_embed.shape
        classes = block.pos_embed.new_zeros(rows, 1, width)
        if condition is not None:
            classes += condition
        scale = block.pos_embed.new_full((rows,), block.head_dim**-0.5)
        if temperature is not None:
            scale /= temperature.flatten()
        heads = width // block.head_dim
        self._tokens = _Tokens(width=width, heads=heads, num_patches=num_patches)
        caches = [
            block.pos_embed.new_empty(rows, heads, size(ctypes.byref(self._tokens)))
            for _ in layers
            for size in (found.keys_size, found.values_size)
        ]
        self._tokens.logit_scale = self._keep(scale)
        self._transformer.classes = self._keep(classes)
        for layer, keys, values in zip(self._layers, caches[::2], caches[1::2], strict=True):
            layer.keys, layer.values = self._keep(keys), self._keep(values)

    def __call__(self, x: Tensor, at: int | Tensor, stop: int) -> Tensor:
        tokens, output = self._tokens, self._transformer.output
        tokens.batch, tokens.tokens = x.shape[:2]
        x = x.contiguous()
        assert x.dtype == torch.float32
        if isinstance(at, int):
            place = torch.full((len(x),), at, dtype=torch.int32, device="cpu")
        else:
            place = at.int().contiguous()
        tokens.place = place.data_ptr()
        out = x.new_empty(*x.shape[:2], output.outs)
        self._library.extend(
            ctypes.byref(self._transformer),
            ctypes.byref(tokens),
            x.data_ptr(),
            out.data_ptr(),
            self._threads,
        )
        return out

    def _layer(self, layer: nn.Module) -> _Layer:
        assert isinstance(layer, TransformerLayer)
        attention, mlp = layer.attention, layer.mlp
        up, _, down = mlp.main
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        return _Layer(
            attention_norm=self._norm(attention.norm),
            qkv=self._linear(attention.qkv),
            proj=self._linear(attention.proj),
            mlp_norm=self._norm(mlp.norm),
            up=self._linear(up),
            down=self._linear(down),
        )

    def _linear(self, linear: nn.Linear) -> _Linear:
        outs, ins = linear.weight.shape
        weight = linear.weight.detach().contiguous()
        packed = weight.new_empty(self._library.packed_size(outs, ins))
        self._library.pack(weight.data_ptr(), outs, ins, packed.data_ptr(), self._threads)
        return _Linear(self._keep(packed), self._keep(linear.bias), ins, outs)

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._keep(norm.weight), self._keep(norm.bias), norm.eps)

    def _keep(self, tensor: Tensor) -> int:
        """Its address, which stays valid as long as this object does."""
        tensor = tensor.detach().contiguous()
        self._pointed_at.append(tensor)
        return tensor.data_ptr()
