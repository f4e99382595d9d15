"""Images in a request: `data:` addresses, which hold the picture themselves. Nothing is fetched from anywhere.

A picture of a few kilobytes may unfold to billions of pixels, so its size is read from its header before it is decoded
(data/images.py), and there are few in a request.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zero2hero.errors import UserError
from zero2hero.serve.errors import ApiError
from zero2hero.serve.schema import IMAGES, ChatMessage, ImagePart

if TYPE_CHECKING:
    from PIL.Image import Image

    from zero2hero.language_model import LanguageModel

PIXELS = 16 * 2**20  # of one image
_DATA = re.compile(r"data:image/[a-z+.-]+;base64,(.*)", re.DOTALL)


def images_of(lm: LanguageModel, messages: Sequence[ChatMessage]) -> list[Image]:
    """The images of a conversation, in their order.

    Raises:
        ApiError: the model does not see, there are too many, or one is no PNG, JPEG or WebP in a data: address.
    """
    contents = [message.content for message in messages if isinstance(message.content, list)]
    parts = [part for content in contents for part in content if isinstance(part, ImagePart)]
    if parts and lm.eyes is None:
        raise _refused("this model reads text alone: it has no eyes for images")
    if len(parts) > IMAGES:
        raise _refused(f"a request may have {IMAGES} images, not {len(parts)}")
    return [_opened(part.address) for part in parts]


def _opened(address: str) -> Image:
    from zero2hero.data.images import open_image

    found = _DATA.fullmatch(address)
    if not found:
        raise _refused("an image is given as 'data:image/png;base64,...' (or jpeg, webp); no address is fetched")
    try:
        return open_image(base64.b64decode(found[1], validate=True), max_pixels=PIXELS)
    except (binascii.Error, UserError) as error:
        raise _refused(str(error) if isinstance(error, UserError) else "an image's base64 is damaged") from None


def _refused(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_image")
