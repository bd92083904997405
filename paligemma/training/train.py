"""Make the embedded checkpoint: `python -m paligemma.training.train --output FOLDER`.

Stage by stage, from what is quick to learn from to what is like life:

- `contrastive`: the eye learns which caption belongs to a small crop of one object.
- `naming`: it learns to name such crops, more and more of them in styles of no artist.
- `masks`: a VQ-VAE learns to put silhouettes into 16 codes.
- `patches`: the eye goes on to whole scenes, and says of each patch what it shows.
- `voice`: the eye stays as it is; projector and voice learn all tasks from its features.
- `together`: all learn together, the eye slowly, and goes on to name its patches.
- `larger`: the same, on larger pictures, in which each object fills more patches.
- `deeper`: the same, with more layers between what the voice begins and ends with, to relate objects in.
- `keener`: the same, with more layers in the eye, and with an optimiser that learns more from each step.
- `pointed`: the same, with one more layer at the eye's end, and shown where to look for a box's sides and a mask's codes.
- `traced`: the same, with more masks, judged by what is decoded of them; their decoder learns from what the voice says.
- `finer`: the same, on still larger pictures, and with the codes that are read being those that the voice has said.
- `fuller`: the same, with more masks still, and fewer of the other answers.
- `bolder`: the same, with fewer masks again, and with an eye that learns as fast as the rest.

`--stage NAME` does one only. A run that was interrupted goes on from its last save when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoints import save_checkpoint
from ..config import PaliGemmaConfig
from ..mask_decoder import MaskDecoder
from ..model import PaliGemma
from ..processor import Processor
from . import contrastive, looking, naming
from .artwork import HELD_OUT_STYLE, KINDS, STYLES, load_fonts, load_sprites
from .batches import CropBatches, InBackground, PatchBatches, Rows, SceneBatches, move
from .contrastive import CROP_SIZE
from .loop import Run, checkpoint_gradients
from .losses import TokenRisk, answer_loss
from .mask_codec import CODE_WIDTH, CODES, WIDTH, MaskBatches, MaskCodec, decoded_loss, reconstruction_iou
from .patches import PatchHeads, PatchLabels, PatchModel, RelationHeads
from .scenes import MAX_OBJECTS, Painter
from .start import EYE_LAYERS, IMAGE_SIZE, TEXT_LAYERS, deepen, initialise, resize_positions, tiny_config
from .tokenizer import IMAGE_TOKEN, LOC_TOKENS, SEG_TOKENS, build_tokenizer

SPRITE_SIZE = 128
SCENES_A_BATCH = 64  # for the eye
PICTURES_A_BATCH = 12  # for the voice alone, with about five rows each
PICTURES_TOGETHER = 48  # for the eye, when all learn together
FIRST_MAX_OBJECTS = 2
FIRST_IMAGE_SIZE = 112  # pixels, while most is learnt: a picture of `IMAGE_SIZE` costs four times as much
LARGER_IMAGE_SIZE = 168
FIRST_EYE_LAYERS = 6
FIRST_TEXT_LAYERS = 4  # of the voice
KEENER_EYE_LAYERS = 8
STEPS = {
    "contrastive": 700,
    "naming": 1500,
    "masks": 2500,
    "patches": 5250,
    "voice": 1500,
    "together": 11750,
    "larger": 2050,
    "deeper": 2050,
    "keener": 1600,
    "pointed": 2000,
    "traced": 1750,
    "finer": 850,
    "fuller": 620,
    "bolder": 720,
}
PEAKS = {
    "contrastive": 1e-3,
    "naming": 1e-3,
    "masks": 2e-3,
    "patches": 8e-4,
    "voice": 1.5e-3,
    "together": 1e-3,
    "larger": 7.5e-4,
    "deeper": 8e-4,
    "keener": 6e-4,
    "pointed": 4e-4,
    "traced": 4e-4,
    "finer": 4e-4,
    "fuller": 4e-4,
    "bolder": 4e-4,
}
POSITIONS = "embeddings.position_embedding.weight"  # of an eye's state
JUDGED = 500  # fresh crops that the first two stages are judged by
EYE_SLOWNESS = 0.4  # the part of the rate at which the eye learns when all do, since it has learnt so much already
DEEPER_EYE_SLOWNESS = 0.6  # once it has new layers
HASTE = 2.0  # of a part that has much to learn while the others do not
PATCH_WEIGHT = 0.5  # of the patches' losses beside the answers'
EYE_LOOK_WEIGHT, VOICE_LOOK_WEIGHT = 0.5, 0.3  # of being shown where to look
MASK_WEIGHT = 2.0  # of what is decoded of the codes that are said
READINGS = 2  # until a row has the voice's own codes: after the first they still tell something of the true ones
LOOKING_LAYERS = range(-3, -1)  # of the decoder, which are shown where to look
SPEAKING_LAYERS = 2  # of the decoder: before these, its states at an object's patches tell how it relates to the others


@dataclass(frozen=True)
class Studio:
    """What every stage works with: where it saves, what is drawn with, and on which device it learns."""

    folder: Path
    processor: Processor
    painter: Painter
    device: torch.device
    gradient_checkpointing: bool
    compile: bool
    use_clip: bool
    steps: dict[str, int]

    def run(
        self,
        stage: str,
        module: nn.Module,
        factors: Mapping[nn.Module, float] | None = None,
        matrices: Collection[nn.Parameter] = (),
    ) -> Run:
        module = module.to(self.device)
        return Run(stage, module, self.folder, self.steps[stage], PEAKS[stage], factors, matrices)

    def prepare(self, *stacks: nn.ModuleList) -> None:
        """Let the layers of these stacks need less memory, or less time, as it was asked for.

        The voice's last layer is better left as it is: few of its positions look, and Inductor of torch 2.13 fails on it.
        """
        for layers in stacks:
            if self.gradient_checkpointing:
                checkpoint_gradients(layers)
            if self.compile:
                for layer in layers:
                    layer.compile(dynamic=True)  # rows differ in length

    def saved(self, stage: str) -> dict[str, Tensor]:
        """The state of a finished stage's module."""
        path = self.folder / f"{stage}.pt"
        if not path.exists():
            raise SystemExit(f"{path} is missing: train the stage {stage} first.")
        return torch.load(path, map_location="cpu")["module"]

    def saved_eye(self, stage: str) -> dict[str, Tensor]:
        """The eye's part of it."""
        prefix, state = "vision_tower.", self.saved(stage)
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def seed(self, stage: str, run: Run) -> int:
        """No two stages, and no two parts of an interrupted one, see the same scenes."""
        return list(STEPS).index(stage) * 1_000_000 + run.step

    def codec(self) -> MaskCodec:
        codec = MaskCodec()
        codec.load_state_dict(self.saved("masks"))
        return codec.eval()

    def first_code(self) -> int:
        """The id of the first of the mask codes."""
        return self.processor.tokenizer.token_to_id(SEG_TOKENS[0])

    def risks(self) -> list[TokenRisk]:
        first_loc = self.processor.tokenizer.token_to_id(LOC_TOKENS[0])
        risks = (
            TokenRisk.of_coordinates(first_loc, len(LOC_TOKENS)),
            TokenRisk.of_codes(self.first_code(), self.codec().codebook.detach()),
        )
        return [risk.to(self.device) for risk in risks]

    def patch_model(self) -> PatchModel:
        model = PatchModel(self.processor.config.vision)
        model.load_state_dict(self.saved("patches"))
        return model


def tiny_processor(
    image_size: int = FIRST_IMAGE_SIZE, eye_layers: int = FIRST_EYE_LAYERS, text_layers: int = FIRST_TEXT_LAYERS
) -> Processor:
    """For the embedded checkpoint, of pictures of so many pixels either way, and with so deep an eye and a voice."""
    tokenizer = build_tokenizer()
    image_token_id = tokenizer.token_to_id(IMAGE_TOKEN)
    config = tiny_config(tokenizer.get_vocab_size(), image_token_id, image_size, eye_layers, text_layers)
    return Processor(config, tokenizer)


def grow(run: Run, value: Tensor, first: float, last: float) -> None:
    """Let a scalar, shared with the process that draws, rise from `first` to `last` over the first half of a run."""
    value.fill_(first + min(1.0, 2 * run.step / run.steps) * (last - first))


def train_contrastive(studio: Studio) -> None:
    stage = "contrastive"
    model = contrastive.ContrastiveModel(
        studio.processor.config.vision, studio.processor.config.text.vocab_size, studio.use_clip
    )
    run = studio.run(stage, model)
    label = partial(contrastive.caption_ids, studio.processor)
    batches = InBackground(
        CropBatches(
            studio.processor, studio.painter, contrastive.CROPS_A_BATCH, CROP_SIZE, label, studio.seed(stage, run)
        )
    )
    run.train(batches, lambda batch: model.losses(*(part.to(studio.device) for part in batch)))
    print(contrastive.zero_shot(model.cpu(), studio.processor, studio.painter, JUDGED))


def train_naming(studio: Studio) -> None:
    stage = "naming"
    model = naming.NamingModel(studio.processor.config.vision)
    model.vision_tower.load_state_dict(studio.saved_eye("contrastive"))
    run, restyled = studio.run(stage, model), torch.zeros(()).share_memory_()
    painter = copy(studio.painter)
    painter.restyled = restyled
    batches = InBackground(
        CropBatches(
            studio.processor, painter, naming.CROPS_A_BATCH, CROP_SIZE, naming.kinds_of, studio.seed(stage, run)
        )
    )

    def losses(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        grow(run, restyled, 0.0, studio.painter.restyled)
        return model.losses(*(part.to(studio.device) for part in batch))

    run.train(batches, losses)


def train_masks(studio: Studio) -> None:
    stage = "masks"
    codec = MaskCodec()
    run = studio.run(stage, codec)
    batches = InBackground(MaskBatches(studio.painter, studio.seed(stage, run)))
    run.train(batches, lambda masks: codec.losses(masks.to(studio.device)))
    print(f"masks and what is decoded of them overlap by {reconstruction_iou(codec.cpu(), studio.painter, JUDGED):.3f}")


def train_patches(studio: Studio) -> None:
    stage = "patches"
    model = PatchModel(studio.processor.config.vision)
    weights = studio.saved_eye("naming")
    weights[POSITIONS] = resize_positions(weights[POSITIONS], studio.processor.config.vision.num_patches)
    model.vision_tower.load_state_dict(weights)
    with torch.no_grad():
        model.heads["shown"].weight[: len(KINDS)] = studio.saved("naming")["kinds.weight"]
    studio.prepare(model.vision_tower.encoder["layers"])
    run, max_objects = studio.run(stage, model), torch.tensor(FIRST_MAX_OBJECTS).share_memory_()
    batches = InBackground(
        PatchBatches(studio.processor, studio.painter, SCENES_A_BATCH, max_objects, studio.seed(stage, run))
    )

    def losses(batch: tuple[Tensor, PatchLabels]) -> dict[str, Tensor]:
        grow(run, max_objects, FIRST_MAX_OBJECTS, MAX_OBJECTS)
        pixel_values, labels = batch
        return model.losses(pixel_values.to(studio.device), move(labels, studio.device))

    run.train(batches, losses)


def rows_loss(model: PaliGemma, image_features: Tensor, chunks: list[Rows], risks: Sequence[TokenRisk] = ()) -> Tensor:
    """The answers' loss, the mean over the weights; each picture went through the eye once, however many ask about it.

    `image_features`, float [P, patches, width], are projected.
    """
    total, weight = 0.0, 0.0
    for rows in chunks:
        features = image_features[rows.pictures]
        hidden_states = model.hidden_states(
            features, rows.input_ids, rows.prefix_lengths, rows.attention_mask, first=rows.first
        )
        labels, weights = rows.labels[:, rows.first :], rows.weights[:, rows.first :]
        total = total + answer_loss(hidden_states, labels, weights, model.logits, risks)
        weight = weight + weights.sum()
    return total / weight


@contextmanager
def recorded(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer returns while this is open."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


class Together(nn.Module):
    """The whole model, its masks' decoder, the patches' heads, which keep the eye at what it knows, and those that relate objects."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.model = PaliGemma(config)
        self.mask_decoder = MaskDecoder(CODES, CODE_WIDTH, WIDTH)
        self.heads = PatchHeads(config.vision.hidden_size)
        self.relations = RelationHeads(config.text.hidden_size)

    def answer_losses(
        self,
        image_features: Tensor,
        labels: PatchLabels,
        chunks: list[Rows],
        risks: Sequence[TokenRisk],
        shows_looks: bool = False,
        first_code: int | None = None,
    ) -> dict[str, Tensor]:
        """The answers' and the relations'; `image_features` are projected, of the first of the pictures of `labels`.

        Beside them, if it is asked for, how far the voice is from looking where the chunks show, and, if the id of the first
        mask code is given, how far what is decoded of the codes is from the masks.
        """
        voice = self.model.language_model
        with ExitStack() as stack:
            read = {index: stack.enter_context(recorded(voice.layers[index - 1])) for index in LOOKING_LAYERS}
            related = stack.enter_context(recorded(voice.layers[-1 - SPEAKING_LAYERS]))
            last = stack.enter_context(recorded(voice.norm))
            answers = rows_loss(self.model, image_features, chunks, risks)
        states = torch.cat([output[:, : image_features.shape[1]] for output in related])
        pictures = torch.cat([rows.pictures for rows in chunks])
        losses = {"answers": answers, **self.relations.losses(states, pictures, labels)}
        if shows_looks:
            looks = [self._looks_loss(index, outputs, chunks) for index, outputs in read.items()]
            losses["voice_looks"] = VOICE_LOOK_WEIGHT * sum(looks) / len(looks)
        if first_code is not None:
            losses["masks"] = MASK_WEIGHT * self._masks_loss(last, chunks, first_code)
        return losses

    @torch.no_grad()
    def with_said_codes(self, image_features: Tensor, rows: Rows, first_code: int) -> Rows:
        """The rows with the codes that are read as the voice says them, for it to go on from (DAgger, arXiv 1011.0686).

        `image_features` are projected.
        """
        is_label, is_read = (is_code(ids, first_code) for ids in (rows.labels, rows.input_ids))
        chosen = is_read.any(1)
        features, is_label, is_read = image_features[rows.pictures[chosen]], is_label[chosen], is_read[chosen]
        read = rows.input_ids[chosen]
        for _ in range(READINGS if len(read) else 0):
            states = self.model.hidden_states(
                features, read, rows.prefix_lengths[chosen], rows.attention_mask[chosen], first=rows.first
            )
            logits = self._code_logits(states[is_label[:, rows.first :]], first_code)
            read = read.masked_scatter(is_read, logits.argmax(-1) + first_code)
        input_ids = rows.input_ids.clone()
        input_ids[chosen] = read
        return replace(rows, input_ids=input_ids)

    def _looks_loss(self, index: int, outputs: list[Tensor], chunks: list[Rows]) -> Tensor:
        """Of a layer of the voice; `outputs`, of the one before it, by chunk."""
        voice, total = self.model.language_model, 0.0
        for output, rows in zip(outputs, chunks, strict=True):
            rotary = voice.rotary(slice(0, output.shape[1]), output.dtype)
            total = total + len(rows.looks.rows) * looking.voice_loss(voice.layers[index], output, rotary, rows.looks)
        return total / max(1, sum(len(rows.looks.rows) for rows in chunks))

    def _masks_loss(self, outputs: list[Tensor], chunks: list[Rows], first_code: int) -> Tensor:
        """Of what is decoded of the likeliest codes; `outputs`, of the voice's last norm, by chunk."""
        states = [
            output[is_code(rows.labels[:, rows.first :], first_code)]
            for output, rows in zip(outputs, chunks, strict=True)
        ]
        logits = self._code_logits(torch.cat(states), first_code)
        return decoded_loss(self.mask_decoder, logits, torch.cat([rows.masks for rows in chunks]))

    def _code_logits(self, states: Tensor, first_code: int) -> Tensor:
        """Float32 [N, codes], of the voice's last states, [N, width]."""
        return self.model.logits(states)[:, first_code : first_code + CODES]


def is_code(ids: Tensor, first_code: int) -> Tensor:
    """Bool, which of some ids, int64 of any shape, are mask codes; `first_code` is the id of the first of them."""
    return (ids >= first_code) & (ids < first_code + CODES)


def train_voice(studio: Studio) -> None:
    stage = "voice"
    together = Together(studio.processor.config)
    model, seeing = together.model, studio.patch_model()
    initialise(model, studio.processor.tokenizer, seeing.heads.seen(), seeing.heads.told())
    model.vision_tower.load_state_dict(seeing.vision_tower.state_dict())
    together.heads.load_state_dict(seeing.heads.state_dict())
    together.mask_decoder.load_state_dict(studio.codec().mask_decoder.state_dict())
    # While the voice is still random, its gradients would undo what the eye has learnt.
    model.vision_tower.requires_grad_(False)
    together.heads.requires_grad_(False)
    studio.prepare(model.language_model.layers[:-1])
    run, max_objects = studio.run(stage, together), torch.tensor(FIRST_MAX_OBJECTS).share_memory_()
    batches = _scene_batches(studio, stage, run, max_objects, PICTURES_A_BATCH, asked_about=PICTURES_A_BATCH)
    risks = studio.risks()

    def losses(batch: tuple[Tensor, PatchLabels, list[Rows]]) -> dict[str, Tensor]:
        grow(run, max_objects, FIRST_MAX_OBJECTS, MAX_OBJECTS)
        pixel_values, labels, chunks = batch
        features = model.image_features(pixel_values.to(studio.device))
        chunks = [move(rows, studio.device) for rows in chunks]
        return together.answer_losses(features, move(labels, studio.device), chunks, risks)

    run.train(batches, losses)


@dataclass(frozen=True)
class Lessons:
    """What differs between the stages in which all learn.

    forerunner: the stage that this one goes on from.
    image_size, eye_layers, text_layers: of the model, as `tiny_processor` takes them; what is new grows out of what there was.
    eye_slowness: the part of the rate at which the eye learns.
    with_muon: whether it moves the model's matrices.
    eye_grows_last: whether the eye's new layer comes at its end, to learn in haste, and not in the middle.
    shows_looks: whether the eye's last layer, and some of the voice's, are shown where to look.
    traces_masks: whether masks are judged by what is decoded of them, and their decoder learns as well.
    reads_own_codes: whether the codes of a mask are read as the voice has said them, instead of nearly as they should be.
    asked_about, captioned, segmented: how many of a batch's pictures the voice is asked about, as `SceneBatches` takes it.
    """

    forerunner: str
    image_size: int = FIRST_IMAGE_SIZE
    eye_layers: int = FIRST_EYE_LAYERS
    text_layers: int = FIRST_TEXT_LAYERS
    eye_slowness: float = EYE_SLOWNESS
    with_muon: bool = False
    eye_grows_last: bool = False
    shows_looks: bool = False
    traces_masks: bool = False
    reads_own_codes: bool = False
    asked_about: int = 12
    captioned: int = 24
    segmented: int = 0


LESSONS = {
    "together": Lessons("voice"),
    "larger": Lessons("together", LARGER_IMAGE_SIZE),
    "deeper": Lessons("larger", LARGER_IMAGE_SIZE, text_layers=TEXT_LAYERS),
    "keener": Lessons("deeper", LARGER_IMAGE_SIZE, KEENER_EYE_LAYERS, TEXT_LAYERS, DEEPER_EYE_SLOWNESS, with_muon=True),
}
LESSONS["pointed"] = replace(
    LESSONS["keener"], forerunner="keener", eye_layers=EYE_LAYERS, eye_grows_last=True, shows_looks=True
)
LESSONS["traced"] = replace(
    LESSONS["pointed"], forerunner="pointed", eye_grows_last=False, traces_masks=True, captioned=12, segmented=24
)
LESSONS["finer"] = replace(LESSONS["traced"], forerunner="traced", image_size=IMAGE_SIZE, reads_own_codes=True)
LESSONS["fuller"] = replace(LESSONS["finer"], forerunner="finer", asked_about=9, captioned=9, segmented=30)
LESSONS["bolder"] = replace(
    LESSONS["fuller"], forerunner="fuller", eye_slowness=1.0, asked_about=12, captioned=15, segmented=21
)


def train_all(stage: str, studio: Studio) -> None:
    """One of the stages of `LESSONS`."""
    lessons = LESSONS[stage]
    processor = tiny_processor(lessons.image_size, lessons.eye_layers, lessons.text_layers)
    studio = replace(studio, processor=processor)
    together = Together(studio.processor.config)
    state = _grown(studio.saved(lessons.forerunner), studio.processor.config, lessons.eye_grows_last)
    together.load_state_dict(state)
    model = together.model
    eye = model.vision_tower.encoder["layers"]
    studio.prepare(eye, model.language_model.layers[:-1])
    # Of the model itself: Muon is for matrices between hidden states, not for what embeds or reads out.
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)] if lessons.with_muon else []
    factors = {model.vision_tower: lessons.eye_slowness, together.mask_decoder: HASTE}
    if lessons.eye_grows_last:
        factors[eye[-1]] = HASTE
    run = studio.run(stage, together, factors, matrices)
    batches = _scene_batches(
        studio,
        stage,
        run,
        torch.tensor(MAX_OBJECTS),
        PICTURES_TOGETHER,
        asked_about=lessons.asked_about,
        captioned=lessons.captioned,
        segmented=lessons.segmented,
    )
    spoken_of = lessons.asked_about + lessons.captioned + lessons.segmented
    risks, first_code = studio.risks(), studio.first_code()

    def losses(batch: tuple[Tensor, PatchLabels, list[Rows]]) -> dict[str, Tensor]:
        pixel_values, labels, chunks = batch
        labels, chunks = move(labels, studio.device), [move(rows, studio.device) for rows in chunks]
        with recorded(eye[-2]) as outputs:
            features = model.vision_tower(pixel_values.to(studio.device))
        patches = together.heads.losses(features, labels)
        projected = model.multi_modal_projector["linear"](features[:spoken_of])
        if lessons.reads_own_codes:
            chunks = [together.with_said_codes(projected, rows, first_code) for rows in chunks]
        answers = together.answer_losses(
            projected, labels, chunks, risks, lessons.shows_looks, first_code if lessons.traces_masks else None
        )
        losses = {**answers, **{name: PATCH_WEIGHT * loss for name, loss in patches.items()}}
        if lessons.shows_looks:
            losses["eye_looks"] = EYE_LOOK_WEIGHT * looking.eye_loss(eye[-1], outputs[0], labels)
        return losses

    run.train(batches, losses)
    save_checkpoint(model.cpu(), studio.processor.tokenizer, studio.folder, torch.bfloat16)
    decoder = together.mask_decoder.cpu().state_dict()
    save_file({name: value.bfloat16() for name, value in decoder.items()}, studio.folder / "mask_decoder.safetensors")


def _grown(weights: dict[str, Tensor], config: PaliGemmaConfig, eye_grows_last: bool) -> dict[str, Tensor]:
    """The state of `Together`, made to fit a config with more patches, or more layers of the eye or the voice.

    They come in the middle, or, of the eye, at the end.
    """
    positions = f"model.vision_tower.{POSITIONS}"
    weights[positions] = resize_positions(weights[positions], config.vision.num_patches)
    for prefix, layers, at_end in (
        ("model.vision_tower.encoder.", config.vision.num_hidden_layers, eye_grows_last),
        ("model.language_model.", config.text.num_hidden_layers, False),
    ):
        state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        weights |= {f"{prefix}{name}": value for name, value in deepen(state, layers, at_end).items()}
    return weights


def _scene_batches(
    studio: Studio, stage: str, run: Run, max_objects: Tensor, pictures: int, **asked: int
) -> InBackground:
    """Of so many pictures; `asked`, as `SceneBatches` takes it, says which the voice is asked about, and what."""
    seed = studio.seed(stage, run)
    return InBackground(
        SceneBatches(studio.processor, studio.painter, pictures, max_objects, seed, studio.codec(), **asked)
    )


STAGES: dict[str, Callable[[Studio], None]] = {
    "contrastive": train_contrastive,
    "naming": train_naming,
    "masks": train_masks,
    "patches": train_patches,
    "voice": train_voice,
    **{stage: partial(train_all, stage) for stage in LESSONS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint, its logs and its saves")
    parser.add_argument("--stage", choices=STAGES, help="one stage only")
    parser.add_argument("--steps", type=int, help="of that stage")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clip", action="store_true", help="CLIP's loss in the contrastive stage, for comparison")
    parser.add_argument("--hold-out", action="store_true", help="leave one style out, to judge the recipe by it")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="a third more work for less memory")
    parser.add_argument("--compile", action="store_true", help="faster after a minute; needs a C++ compiler")
    arguments = parser.parse_args()
    if arguments.steps and not arguments.stage:
        parser.error("--steps needs --stage")
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    styles = [style for style in range(len(STYLES)) if not (arguments.hold_out and style == HELD_OUT_STYLE)]
    studio = Studio(
        folder=arguments.output,
        processor=tiny_processor(),
        painter=Painter(load_sprites(SPRITE_SIZE)[styles], load_fonts()),
        device=torch.device(arguments.device),
        gradient_checkpointing=arguments.gradient_checkpointing,
        compile=arguments.compile,
        use_clip=arguments.clip,
        steps=STEPS | ({arguments.stage: arguments.steps} if arguments.steps else {}),
    )
    for stage in [arguments.stage] if arguments.stage else STAGES:
        STAGES[stage](studio)


if __name__ == "__main__":
    main()
