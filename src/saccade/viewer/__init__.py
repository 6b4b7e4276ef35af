"""The viewer: attention of one run of a model as a page on this machine, or as one file to share."""

from .capture import Capture, Layer, Sequence
from .export import page
from .server import Server
from .session import Session

__all__ = ["Capture", "Layer", "Sequence", "Server", "Session", "page"]
