"""Which of some model definitions the Python agent takes, by its own parser and validator.

Usage: model_definitions.py FILE...

Prints a line per file: `refused`, or the models as JSON.
"""

import json
import sys
from pathlib import Path

from ai.backend.common.config import model_definition_iv
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from trafaret import DataError

for name in sys.argv[1:]:
    try:
        print(json.dumps(model_definition_iv.check(YAML().load(Path(name).read_text()))["models"]))
    except (DataError, YAMLError):
        print("refused")
