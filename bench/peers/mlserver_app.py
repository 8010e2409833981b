"""MLServer: one inference worker per core, V2 with Base64."""

from common import answer, load_engine
from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Cxr(MLModel):
    """One model in one inference worker."""

    async def load(self) -> bool:
        self.engine = load_engine()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = Base64Codec.decode_input(payload.inputs[0])
        answers = [answer(self.engine, image) for image in images]
        return InferenceResponse(
            model_name=self.name, outputs=[StringCodec.encode_output("answer", answers)]
        )
