"""Settings of the nearest-neighbour vote."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from harmony.evaluation.settings.base import Settings


def _ascending(value: Any) -> Any:
    """One number where a list may stand, and a list in order, each once."""
    value = [value] if isinstance(value, int) else value
    return sorted(set(value)) if isinstance(value, list | tuple) and all(type(k) is int for k in value) else value


class KnnConfig(Settings):
    """Classification by the nearest training images."""

    ks: Annotated[
        tuple[Annotated[int, Field(ge=1, le=10_000)], ...],
        BeforeValidator(_ascending),
        Field(min_length=1, description="numbers of neighbours that vote; each is reported, as top1@20"),
    ] = (10, 20, 100)
    k: int = Field(20, ge=1, le=10_000, description="the one of them reported as top1; chosen before, not on the data")
    temperature: float = Field(0.07, gt=0, le=1e3, description="a neighbour's vote is exp(similarity / temperature)")
    representation: Literal["cls", "embedding", "cls_patches"] = Field(
        "cls",
        description="what stands for an image: the last block's class token, the embedding shared with texts, or the "
        "class token beside the mean of the patch tokens",
    )
    block: int = Field(4096, ge=1, le=2**20, description="training images compared at a time; sets the memory needed")

    @model_validator(mode="after")
    def _k_is_one_of_them(self) -> "KnnConfig":
        if self.k not in self.ks:
            raise ValueError(
                f"k {self.k} is not one of ks {', '.join(map(str, self.ks))}; add it to ks, or set k to one of them"
            )
        return self
