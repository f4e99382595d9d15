"""A language model that sees: what an image model found is put among the words.

LLaVA (Liu et al. 2023, arXiv 2304.08485; 2310.03744): the states of CLIP's patches go through a small projector and
become vectors like those of words. In the prompt stands one image token for each; its embedding is replaced, and the
decoder reads on as if it were text. Little has to be learned: first the projector alone, everything else frozen, then
the projector and the language model. That is no setting of the model, but `requires_grad_` of its parts:

    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(False)      # the first stage; True in the second

B texts, T time, I images, N image tokens for each, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from zero2hero.errors import UserError
from zero2hero.model_configs import SeeingConfig, VisionLanguageConfig
from zero2hero.models.decoder import Decoder
from zero2hero.models.vision import VisionTransformer
from zero2hero.nn.feedforward import ACTIVATIONS
from zero2hero.nn.kv_cache import KVCache


class Projector(nn.Module):
    """States of patches [..., V] -> vectors like those of words [..., D]."""

    def __init__(self, c: VisionLanguageConfig) -> None:
        super().__init__()
        inner, bias = c.text_config.hidden_size, c.multimodal_projector_bias
        self.linear_1 = nn.Linear(c.vision_config.hidden_size * len(c.feature_layers), inner, bias=bias)
        self.linear_2 = nn.Linear(inner, inner, bias=bias)
        self.activation = c.projector_hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))


class VisionLanguage(nn.Module):
    """`hidden = model(ids, pixels)`, `logits = model.logits(hidden)`."""

    tower_class: type[VisionTransformer] = VisionTransformer  # a variant has others
    projector_class: type[nn.Module] = Projector

    def __init__(self, config: SeeingConfig) -> None:
        super().__init__()
        self.config: Any = config.derived()
        c = self.config
        self.vision_tower = self.tower_class(c.vision_config)
        self.projector = self.projector_class(c)
        self.language_model = Decoder(c.text_config)

    def forward(
        self,
        ids_BT: Tensor,
        pixels_ICHW: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        branch_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] of the language model; see `embed`, and `Decoder` for the rest."""
        return self.language_model(self.embed(ids_BT, pixels_ICHW), positions, document_ids, cache, branch_ids)

    def embed(self, ids_BT: Tensor, pixels_ICHW: Tensor | None = None) -> Tensor:
        """The vectors [B, T, D] of tokens and images.

        Args:
            ids_BT: token ids, `config.num_image_tokens` image tokens for each image (see `expand`).
            pixels_ICHW: the images of all rows, in their order.

        Raises:
            UserError: more or fewer image tokens than the images have.
        """
        return self.merge(ids_BT, None if pixels_ICHW is None else self.image_features(pixels_ICHW))

    def merge(self, ids_BT: Tensor, features_IND: Tensor | None) -> Tensor:
        """The vectors [B, T, D] of tokens, with what `image_features` found in the places of the image tokens."""
        x = self.language_model.embed_tokens(ids_BT)
        places = ids_BT == self.config.image_token_index
        images, each = (0, self.config.num_image_tokens) if features_IND is None else features_IND.shape[:2]
        if int(places.sum()) != images * each:
            raise UserError(
                f"the text has {int(places.sum())} image tokens (id {self.config.image_token_index}), and {images} "
                f"images of {each} need {images * each}"
            )
        return x if features_IND is None else x.masked_scatter(places[..., None], features_IND.to(x.dtype))

    def image_features(self, pixels_ICHW: Tensor) -> Tensor:
        """What takes the place of an image's tokens: [I, N, D]."""
        states = self.vision_tower.states(pixels_ICHW, self.config.feature_layers)
        first = int(self.config.vision_feature_select_strategy == "default")  # without the class token
        return self.projector(torch.cat([x[:, first:] for x in states], -1))

    def expand(self, ids: Sequence[int]) -> list[int]:
        """A text with one image token where an image is meant, as the model reads it: with one for each feature."""
        mark, count = self.config.image_token_index, self.config.num_image_tokens
        return [i for token in ids for i in ([mark] * count if token == mark else [token])]

    @torch.inference_mode()
    def embed_prompts(self, prompts: Sequence[Sequence[int]], pixels_ICHW: Tensor | None = None) -> list[Tensor]:
        """The vectors [T, D] of each prompt (already expanded), which `generate_tokens` reads in place of its ids."""
        blank = int(self.config.image_token_index == 0)
        device = self.language_model.embed_tokens.weight.device
        rows = [torch.tensor(prompt, device=device) for prompt in prompts]
        vectors = self.embed(pad_sequence(rows, batch_first=True, padding_value=blank), pixels_ICHW)
        return [vector[: len(row)] for vector, row in zip(vectors, rows)]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return self.language_model.logits(hidden)

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] that turns hidden states into logits, for losses that never build all logits."""
        return self.language_model.head_weight

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache, as the language model's."""
        return self.language_model.make_cache(batch_size, max_length)
