"""`python -m services.logging`"""

import sys

from services.logging.app import build
from services.logging.settings import LoggingSettings
from services.mesh import app

if __name__ == "__main__":
    sys.exit(app.run(LoggingSettings, build))
