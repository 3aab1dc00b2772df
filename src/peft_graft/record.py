"""What results and settings are made of."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Values with names, which do not change and among which none is unknown; as JSON in files."""

    model_config = ConfigDict(frozen=True, extra="forbid")
