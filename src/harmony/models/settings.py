"""Settings of the two towers, as a recipe writes them under `model:`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Colour = tuple[float, float, float]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageConfig(_Settings):
    """The image tower: a timm VisionTransformer by name, with what shall differ from it. A plain string is the name."""

    name: Annotated[str, Field(description="name of a plain timm ViT with a class token")] = "vit_base_patch16_224"
    size: Annotated[
        int | None, Field(ge=1, description="side in px that the learned positions are for; the largest view's if null")
    ] = None
    patch: Annotated[int | None, Field(ge=1, description="patch side in px; the model's own if null")] = None
    width: Annotated[int | None, Field(ge=1, description="token width; the model's own if null")] = None
    depth: Annotated[int | None, Field(ge=1, description="number of blocks; the model's own if null")] = None
    heads: Annotated[int | None, Field(ge=1, description="attention heads; the model's own if null")] = None
    registers: Annotated[int | None, Field(ge=0, description="register tokens; the model's own if null")] = None
    drop_path: Annotated[float, Field(ge=0, lt=1, description="stochastic depth rate of the last block")] = 0.1
    positions: Annotated[
        Literal["antialiased", "published"],
        Field(
            description="how positions are resized for other input sizes: bicubic to the exact grid with antialiasing, "
            "or as the published code does it (no antialiasing, scale (n + 0.1) / N)"
        ),
    ] = "antialiased"
    position_embedding: Annotated[
        Literal["learned", "sine_cosine"],
        Field(
            description="learned positions, or fixed two-dimensional sines and cosines (of a model that is loaded, its "
            "own, fixed)"
        ),
    ] = "learned"
    freeze_patches: Annotated[
        bool, Field(description="whether the patch embedding stays as it was drawn or loaded")
    ] = False
    mean: Annotated[Colour, Field(description="RGB mean that inputs are normalised with")] = (0.485, 0.456, 0.406)
    std: Annotated[Colour, Field(description="RGB standard deviation likewise")] = (0.229, 0.224, 0.225)

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TextConfig(_Settings):
    """The text tower: open_clip's TextTransformer."""

    width: Annotated[int, Field(ge=1, description="token width")] = 512
    layers: Annotated[int, Field(ge=1, description="number of blocks")] = 12
    heads: Annotated[int, Field(ge=1, description="attention heads")] = 8
    context: Annotated[int, Field(ge=3, le=4096, description="longest caption in tokens, begin and end included")] = 77
    activation: Annotated[Literal["gelu", "quick_gelu"], Field(description="activation of the MLPs")] = "gelu"
    truncation: Annotated[
        Literal["keep_end", "cut"],
        Field(
            description="what becomes of a caption longer than the context: its last token turns into the end token, "
            "or (as published) it is cut and loses its end"
        ),
    ] = "keep_end"

    @model_validator(mode="after")
    def _heads_divide(self) -> "TextConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class InitConfig(_Settings):
    """Where the towers' first weights come from."""

    image: Annotated[str | None, Field(description="timm:NAME, open_clip:NAME, published:FILE, a run or a file")] = None
    text: Annotated[str | None, Field(description="open_clip:NAME, published:FILE, a run or a file")] = None


class FrozenConfig(_Settings):
    """A model that is given: it encodes images for objectives that ask for it by its name, and never changes."""

    image: Annotated[ImageConfig, Field(description="its image tower, as it was trained, mean and std included")]
    init: Annotated[
        str | None,
        Field(
            description="its weights: timm:NAME, open_clip:NAME, published:FILE, a run or a file; null for random ones"
        ),
    ]


class ModelConfig(_Settings):
    """Both towers."""

    image: ImageConfig = ImageConfig()
    text: Annotated[TextConfig | None, Field(description="null for a method without captions")] = TextConfig()
    embed: Annotated[int, Field(ge=1, description="width of the space that images and captions share")] = 512
    init: Annotated[
        str | InitConfig | None, Field(description="first weights: one source for both towers, or one for each")
    ] = None
