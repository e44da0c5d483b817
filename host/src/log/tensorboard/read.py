"""Prints as JSON what TensorBoard's own reader finds in the event files of a folder."""
import base64
import json
import sys
from dataclasses import fields

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def number(value):
    """JSON has no NaN."""
    return value if value == value else "NaN"


events = EventAccumulator(sys.argv[1], size_guidance={"images": 0, "histograms": 0, "scalars": 0, "tensors": 0})
events.Reload()
tags = events.Tags()
found = {
    "scalars": {tag: [[event.step, number(event.value)] for event in events.Scalars(tag)] for tag in tags["scalars"]},
    "texts": {
        tag: [[event.step, event.tensor_proto.string_val[0].decode()] for event in events.Tensors(tag)]
        for tag in tags["tensors"]
    },
    "images": {
        tag: [
            [event.step, event.width, event.height, base64.b64encode(event.encoded_image_string[:6]).decode()]
            for event in events.Images(tag)
        ]
        for tag in tags["images"]
    },
    "histograms": {
        tag: [
            [event.step, *(getattr(event.histogram_value, field.name) for field in fields(event.histogram_value))]
            for event in events.Histograms(tag)
        ]
        for tag in tags["histograms"]
    },
}
json.dump(found, sys.stdout)
