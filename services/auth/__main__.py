"""`python -m services.auth`"""

import sys

from services.auth.app import build
from services.auth.settings import AuthSettings
from services.mesh import app

if __name__ == "__main__":
    sys.exit(app.run(AuthSettings, build))
