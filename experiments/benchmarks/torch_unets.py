"""SineNet and the modern U-Net in plain PyTorch, written from their descriptions: peers for speed and for numbers.

Parameters have the names of the published state dicts, so that `physml.convert` reads them.
"""

import math

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}


def waves(value, channels):
    """[cos, sin] of a scalar at geometric frequencies; a zero fills an odd number of channels."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = value[:, None].float() * frequencies
    return functional.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, channels % 2))


def perceptron(channels, activation):
    layer = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}[activation]()
    return nn.Sequential(nn.Linear(channels, 4 * channels), layer, nn.Linear(4 * channels, 4 * channels))


def norm(channels, wanted, groups=1):
    return nn.GroupNorm(groups, channels) if wanted else nn.Identity()


def spread(factors, like):
    return factors.reshape(*factors.shape, *(1,) * (like.ndim - 2))


class SineBlock(nn.Module):
    """Two convolutions, each with norm and activation; the embedding acts between them."""

    def __init__(self, inputs, outputs, options):
        super().__init__()
        mode = options["padding_mode"]
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode=mode)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, padding_mode=mode)
        self.norm1, self.norm2 = norm(outputs, options["norm"]), norm(outputs, options["norm"])
        self.activate, self.scaled = ACTIVATIONS[options["activation"]], options["use_scale_shift_norm"]
        if options["conditioned"]:
            self.cond_emb = nn.Linear(4 * options["hidden_channels"], outputs * (1 + self.scaled))

    def forward(self, x, embedding):
        h = self.activate(self.norm1(self.conv1(x)))
        if embedding is not None:
            factors = spread(self.cond_emb(embedding), h)
            if self.scaled:
                scale, shift = factors.chunk(2, 1)
                h = h * (1 + scale) + shift
            else:
                h = h + factors
        return self.activate(self.norm2(self.conv2(h)))


class SineLevel(nn.Module):
    """Blocks with a connection round each."""

    def __init__(self, inputs, beside, outputs, options):
        super().__init__()
        sizes = [inputs + beside] + [outputs] * (options["num_blocks"] - 1)
        self.conv = nn.ModuleList([SineBlock(size, outputs, options) for size in sizes])
        self.residual = options["residual"]
        if self.residual:
            self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, base, embedding):
        for i, block in enumerate(self.conv):
            h = block(x, embedding)
            x = h + (self.shortcut(base) if i == 0 else x) if self.residual else h
        return x


class SineNet(nn.Module):
    """Four levels per wave; see `physml.models.sinenet`."""

    def __init__(self, inputs, outputs, *, scalars=0, **options):
        super().__init__()
        options = {
            "mult": 2, "num_waves": 2, "num_blocks": 1, "norm": True, "activation": "gelu", "residual": True,
            "wave_residual": True, "disentangle": True, "avg_pool": True, "interpolation_mode": "bicubic",
            "use_scale_shift_norm": False, "conditioned": bool(scalars), **options,
        }  # fmt: skip
        self.options, width = options, options["hidden_channels"]
        sizes = [int(width * options["mult"] ** i) for i in range(5)]
        if scalars:
            self.time_embed = perceptron(width, options["activation"])
        if scalars > 1:
            self.pde_emb = perceptron(width, options["activation"])
        ends = {"kernel_size": 3, "padding": 1, "padding_mode": options["padding_mode"]}
        self.image_proj = nn.Conv2d(inputs, width, **ends)
        pairs, beside = list(zip(sizes, sizes[1:])), width * options["disentangle"]
        downs = lambda: [SineLevel(a, beside * (i > 0), b, options) for i, (a, b) in enumerate(pairs)]  # noqa: E731
        ups = lambda: [SineLevel(b, a, a, options) for a, b in reversed(pairs)]  # noqa: E731
        self.down = nn.ModuleList([nn.ModuleList(downs()) for _ in range(options["num_waves"])])
        self.up = nn.ModuleList([nn.ModuleList(ups()) for _ in range(options["num_waves"])])
        self.final = nn.Conv2d(width, outputs, **ends)

    def double(self, x):
        mode, size = self.options["interpolation_mode"], 2
        if self.options["padding_mode"] != "circular":
            return functional.interpolate(x, scale_factor=size, mode=mode)
        x = functional.interpolate(functional.pad(x, (2, 2, 2, 2), mode="circular"), scale_factor=size, mode=mode)
        return x[..., 4:-4, 4:-4]

    def forward(self, x, time=None, z=None):
        width, embedding = self.options["hidden_channels"], None
        if time is not None:
            embedding = self.time_embed(waves(time, width))
        if z is not None:
            embedding = embedding + self.pde_emb(waves(z, width))
        pool = functional.avg_pool2d if self.options["avg_pool"] else functional.max_pool2d
        x = self.image_proj(x)
        for down, up in zip(self.down, self.up):
            stack, own = [x], x
            for i, level in enumerate(down):
                own, base = pool(own, 2), pool(stack[-1], 2)
                joined = torch.cat([base, own], 1) if i and self.options["disentangle"] else base
                stack.append(level(joined, base, embedding))
            h = stack.pop()
            for level in up:
                base = self.double(h)
                h = level(torch.cat([stack.pop(), base], 1), base, embedding)
            x = x + h if self.options["wave_residual"] else h
        return self.final(x)


class Residual(nn.Module):
    """Norm, activation, convolution, twice, round a shortcut."""

    def __init__(self, inputs, outputs, options):
        super().__init__()
        conv, mode = options["conv"], options["padding_mode"]
        self.conv1 = conv(inputs, outputs, 3, padding=1, padding_mode=mode)
        self.conv2 = conv(outputs, outputs, 3, padding=1, padding_mode=mode)
        self.shortcut = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.norm1, self.norm2 = norm(inputs, options["norm"]), norm(outputs, options["norm"])
        self.activate, self.scaled = ACTIVATIONS[options["activation"]], options["use_scale_shift_norm"]
        if options["conditioned"]:
            self.cond_emb = nn.Linear(4 * options["hidden_channels"], outputs * (1 + self.scaled))

    def forward(self, x, embedding):
        h = self.conv1(self.activate(self.norm1(x)))
        if embedding is None:
            return self.conv2(self.activate(self.norm2(h))) + self.shortcut(x)
        factors = spread(self.cond_emb(embedding), h)
        if self.scaled:
            scale, shift = factors.chunk(2, 1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + factors)
        return self.conv2(self.activate(h)) + self.shortcut(x)


class Attention(nn.Module):
    """One head; the weights of each key add up to one. Its norm is a parameter that nothing reads."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.projection = nn.GroupNorm(1, channels), nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = self.projection(tokens).chunk(3, -1)
        weights = (query @ key.transpose(1, 2) * x.shape[1] ** -0.5).softmax(1)
        return (self.output(weights @ value) + tokens).transpose(1, 2).reshape(x.shape)


class Stage(nn.Module):
    """A residual block, and attention where wanted."""

    def __init__(self, inputs, outputs, attends, options):
        super().__init__()
        self.res = Residual(inputs, outputs, options)
        self.attn = Attention(outputs) if attends else nn.Identity()

    def forward(self, x, embedding):
        return self.attn(self.res(x, embedding))


class Middle(nn.Module):
    def __init__(self, channels, attends, options):
        super().__init__()
        self.res1, self.res2 = (Residual(channels, channels, options) for _ in range(2))
        self.attn = Attention(channels) if attends else nn.Identity()

    def forward(self, x, embedding):
        return self.res2(self.attn(self.res1(x, embedding)), embedding)


class Resample(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x, embedding):
        return self.conv(x)


class ModernUNet(nn.Module):
    """One to three dimensions; see `physml.models.modern_unet`. `numbered`: names of the n-dimensional class."""

    def __init__(self, inputs, outputs, *, ndim=2, scalars=0, numbered=False, **options):
        super().__init__()
        conv, finer = getattr(nn, f"Conv{ndim}d"), getattr(nn, f"ConvTranspose{ndim}d")
        options = {
            "norm": False, "ch_mults": (1, 2, 2, 4), "is_attn": (False,) * 8, "mid_attn": False, "n_blocks": 2,
            "use1x1": False, "activation": "gelu", "padding_mode": "zeros", "use_scale_shift_norm": False,
            "conditioned": bool(scalars), "conv": conv, **options,
        }  # fmt: skip
        self.options, width, mults = options, options["hidden_channels"], options["ch_mults"]
        if scalars:
            self.time_embed = perceptron(width, options["activation"])
        if scalars > 1:
            several = [perceptron(width, options["activation"]) for _ in range(scalars - 1)]
            self.pde_emb = nn.ModuleList(several) if numbered else several[0]
        self.numbered, mode = numbered, options["padding_mode"]
        ends = {"kernel_size": 1} if options["use1x1"] else {"kernel_size": 3, "padding": 1, "padding_mode": mode}
        self.image_proj = conv(inputs, width, **ends)
        down, channels = [], width
        for i in range(len(mults)):
            for _ in range(options["n_blocks"]):
                down.append(Stage(channels, width * math.prod(mults[: i + 1]), options["is_attn"][i], options))
                channels = width * math.prod(mults[: i + 1])
            if i < len(mults) - 1:
                down.append(Resample(conv(channels, channels, 3, 2, 1, padding_mode=mode)))
        up = []
        self.middle = Middle(channels, options["mid_attn"], options)
        for i, factor in reversed(list(enumerate(mults))):
            up += [Stage(2 * channels, channels, options["is_attn"][i], options) for _ in range(options["n_blocks"])]
            up.append(Stage(channels + channels // factor, channels // factor, options["is_attn"][i], options))
            channels //= factor
            if i:
                up.append(Resample(finer(channels, channels, 4, 2, 1)))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.norm = norm(width, options["norm"], 8)
        self.final = conv(width, outputs, **ends)

    def forward(self, x, time=None, z=None):
        width, embedding = self.options["hidden_channels"], None
        if time is not None:
            embedding = self.time_embed(waves(time, width))
        if z is not None:
            for i in range(z.shape[1]):
                embedding = embedding + (self.pde_emb[i] if self.numbered else self.pde_emb)(waves(z[:, i], width))
        x = self.image_proj(x)
        stack = [x]
        for layer in self.down:
            x = layer(x, embedding)
            stack.append(x)
        x = self.middle(x, embedding)
        for layer in self.up:
            x = layer(x if isinstance(layer, Resample) else torch.cat([x, stack.pop()], 1), embedding)
        return self.final(ACTIVATIONS[self.options["activation"]](self.norm(x)))
