"""`python -m services.inference`"""

import sys

from services.inference.app import build
from services.inference.settings import InferenceSettings
from services.mesh import app

if __name__ == "__main__":
    sys.exit(app.run(InferenceSettings, build))
