"""A real browser, for the tests of the pages."""

from chromium import browser as browser
