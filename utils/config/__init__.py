"""Configs: declared key by key where a key belongs, loaded from files and the command line, described for people."""

from utils.config.components import Component, choice_of, known_keys, register
from utils.config.keys import Config, KeyGroup, key, title_of
from utils.config.load import command_line_changes, config_from_dict, config_of_record, config_warnings, load_config

__all__ = ["Component", "Config", "KeyGroup", "choice_of", "command_line_changes", "config_from_dict", "config_of_record",
           "config_warnings", "key", "known_keys", "load_config", "register", "title_of"]
