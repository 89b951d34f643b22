"""The modules under test lie beside this folder, and are not installed. A warning is an error."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    """Here and not in a pytest.ini, which would be one more file at the top."""
    config.addinivalue_line("filterwarnings", "error")
