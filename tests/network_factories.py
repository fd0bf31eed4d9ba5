"""A user's file with network factories: ``small`` has positions stem, body.0, body.2; the others have faults."""

from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.conv(x) + x)


def small(classes, input_shape):
    stem = nn.Conv2d(input_shape[0], 8, 4, stride=4)
    body = nn.Sequential(Block(8), nn.MaxPool2d(2), Block(8))
    return Net(stem, body, nn.Linear(8, classes))


class Net(nn.Module):
    def __init__(self, stem, body, head):
        super().__init__()
        self.stem, self.body, self.head = stem, body, head

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def two(classes):
    return Two(classes)


def slip(classes):
    return Slip(classes)


class Plain(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.last = nn.Linear(64, classes)

    def forward(self, x):
        return self.last(self.stem(x).flatten(1))


class Two(Plain):
    """Returns auxiliary logits in training mode, like torchvision's googlenet."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class Slip(Plain):
    """``train`` without ``return self``: a common slip in code that keeps BatchNorm frozen."""

    def train(self, mode=True):
        super().train(mode)
