"""Tasks that write about images: image-text-to-text and visual-question-answering, with LLaVA, SmolVLM and kin.

The text says where each image belongs, by one image token; a chat template writes it where a message has an image among
its parts. There the model reads vectors that the image became (models/vision_language.py), and writes on as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zero2hero.data.images import open_image
from zero2hero.errors import UserError
from zero2hero.language_model import SETTINGS, LanguageModel, Parts
from zero2hero.pipelines.base import Pipeline
from zero2hero.pipelines.look import is_image
from zero2hero.pipelines.write import joined
from zero2hero.seeing import joined_pixels, seeing_model
from zero2hero.tokenizer.chat import is_conversation


class SeeingPipeline(Pipeline):
    """Base of the tasks in which a model writes about images."""

    more_settings = tuple(SETTINGS)

    def __init__(self, parts: Parts | LanguageModel, task: str, settings: dict[str, Any]) -> None:
        super().__init__(parts, task, settings)
        assert isinstance(parts, Parts)
        self.lm, self.tokenizer = seeing_model(parts), parts.tokenizer
        assert self.lm.eyes is not None
        self.eyes = self.lm.eyes

    def prompt(self, one: Any) -> tuple[list[int], Tensor | None]:
        """What the model reads of one input: token ids, and the pixels [I, C, H, W] of its images where there are some.

        Raises:
            UserError: another number of images than the text has places for.
        """
        if isinstance(one, dict):
            images = list(one["images"]) if isinstance(one["images"], (list, tuple)) else [one["images"]]
            text = one["text"]
        elif isinstance(one, str):
            images, text = [], one
        else:
            begun = one[-1]["role"] == "assistant"
            ending = {"add_generation_prompt": not begun, "continue_final_message": begun}
            images, text = _images_of(one), self.tokenizer.apply_chat_template(one, tokenize=False, **ending)
        opened = [open_image(image) for image in images]
        text = self.eyes.placed(text, opened)
        bos = self.tokenizer.special_token("bos_token")
        ids = self.tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        return self.eyes.expand(ids), self.eyes.pixels(opened)

    def write(self, prompts: list[tuple[list[int], Tensor | None]], **settings: Any) -> list[str]:
        """What the model writes behind each prompt, prompt by prompt."""
        ids = [ids for ids, _ in prompts]
        vectors = self.eyes.vectors(ids, joined_pixels([pixels for _, pixels in prompts]))
        return self.lm.continuations(ids, embeddings=vectors, **settings)


class ImageTextToText(SeeingPipeline):
    """[{"input_text", "generated_text"}] for a conversation, for images and a text, or for a text alone.

    A conversation comes back with its answer. Its images are parts of messages: {"type": "image", "image": ...}.
    """

    takes = 'a conversation, {"images": ..., "text": ...} or a text'

    def __call__(self, inputs: Any = None, text: Any = None, *, images: Any = None, **settings: Any) -> Any:
        """See `Pipeline`. Images and text may be given apart: the images in the order of the image tokens.

        Several texts come with the images of all of them, and give one list of records.
        """
        images = inputs if images is None else images
        if text is None or images is None:
            return super().__call__(images if text is None else text, **settings)
        if isinstance(text, str):
            return super().__call__({"images": images, "text": text}, **settings)
        left, pairs = [images] if is_image(images) else list(images), []
        for number, one in enumerate(text, start=1):
            count = one.count(self.eyes.mark) if number < len(text) else len(left)
            pairs.append({"images": left[:count], "text": one})
            left = left[count:]
        return [record for records in super().__call__(pairs, **settings) for record in records]

    def is_one(self, inputs: Any) -> bool:
        if not isinstance(inputs, dict):
            return isinstance(inputs, str) or is_conversation(inputs)
        images = inputs.get("images")
        seen = all(map(is_image, images)) if isinstance(images, (list, tuple)) else is_image(images)
        return seen and inputs.keys() == {"images", "text"} and isinstance(inputs["text"], str)

    def run(self, inputs: list[Any], *, return_full_text: bool = True, **settings: Any) -> list[list[dict[str, Any]]]:
        """Settings as for `LanguageModel.generate`; those not given come from generation_config.json."""
        given = [one["text"] if isinstance(one, dict) else one for one in inputs]
        texts = self.write([self.prompt(one) for one in inputs], **settings)
        copies, records = len(texts) // len(inputs), []
        for row, text in enumerate(texts):
            before = given[row // copies]
            records.append({"input_text": before, "generated_text": joined(before, text) if return_full_text else text})
        return [records[i : i + copies] for i in range(0, len(records), copies)]


class VisualQuestionAnswering(SeeingPipeline):
    """[{"answer"}] for {"image": ..., "question": ...}.

    The model reads image and question through its chat template; without one, as the image, the question and the end of
    the line. It takes the likeliest words unless told to sample.
    """

    takes = '{"image": ..., "question": ...}'

    def __call__(self, inputs: Any = None, question: Any = None, *, image: Any = None, **settings: Any) -> Any:
        """See `Pipeline`. Image and question may be given apart; of several, each question is asked of each image."""
        image = inputs if image is None else image
        if question is None:
            return super().__call__(image, **settings)
        if is_image(image) and isinstance(question, str):
            return super().__call__({"image": image, "question": question}, **settings)
        images = [image] if is_image(image) else list(image)
        questions = [question] if isinstance(question, str) else list(question)
        return super().__call__([{"image": i, "question": q} for q in questions for i in images], **settings)

    def is_one(self, inputs: Any) -> bool:
        if not isinstance(inputs, dict) or inputs.keys() != {"image", "question"}:
            return False
        return is_image(inputs["image"]) and isinstance(inputs["question"], str)

    def run(self, inputs: list[Any], **settings: Any) -> list[list[dict[str, str]]]:
        """Settings as for `LanguageModel.generate`."""
        if not settings.keys() & {"do_sample", "temperature"}:
            settings["do_sample"] = False
        texts = self.write([self.prompt(self._asked(**one)) for one in inputs], **settings)
        answers, copies = [{"answer": text.strip()} for text in texts], len(texts) // len(inputs)
        return [answers[i : i + copies] for i in range(0, len(answers), copies)]

    def _asked(self, image: Any, question: str) -> Any:
        if self.tokenizer.chat_template is None:
            return {"images": image, "text": f"{self.eyes.mark}\n{question}\n"}
        return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def _images_of(messages: Any) -> list[Any]:
    """The images of a conversation, in their order."""
    contents = [message.get("content") for message in messages]
    images = []
    for part in (part for content in contents if isinstance(content, (list, tuple)) for part in content):
        if isinstance(part, Mapping) and part.get("type") == "image":
            image = next((part[key] for key in ("image", "path", "url") if key in part), None)
            if not is_image(image):
                raise UserError('an image in a message is {"type": "image", "image": a file, its bytes or Pillow\'s}')
            images.append(image)
    return images
