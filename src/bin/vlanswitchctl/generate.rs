//! Completions and man pages, from the command lines' own definitions.

use crate::arguments::Arguments;
use crate::context::{Context, Failure, Outcome};
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use vlanswitchd::control::cli;

/// The pages that are written by hand.
const WRITTEN: [(&str, &str); 1] =
    [("vlanswitchd.toml.5", include_str!("../../../dist/man/vlanswitchd.toml.5"))];

/// The section of a program's pages, and what it is called.
fn section(program: &str) -> (&'static str, &'static str) {
    if program == "vlanswitchd" { ("8", "System administration") } else { ("1", "User commands") }
}

pub fn completions(context: &Context, shell: Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "vlanswitchctl", &mut script);
    context.print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

pub fn man(context: &Context, directory: Option<&Path>) -> Outcome {
    let pages = pages().map_err(|error| Failure::Message(format!("man pages: {error}")))?;
    match directory {
        None => {
            let own = pages.iter().find(|(name, _)| name == "vlanswitchctl.1");
            context.print(own.map_or("", |(_, page)| page))?;
        }
        Some(directory) => {
            for (name, page) in &pages {
                let path = directory.join(name);
                let written = fs::create_dir_all(directory).and_then(|()| fs::write(&path, page));
                written
                    .map_err(|error| Failure::Message(format!("{}: {error}", path.display())))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// File names and contents of the pages: of both programs, and of the file.
fn pages() -> io::Result<Vec<(String, String)>> {
    let mut pages = Vec::new();
    for (program, mut command) in
        [("vlanswitchd", cli::Arguments::command()), ("vlanswitchctl", Arguments::command())]
    {
        // Global options then stand on the pages of the commands too.
        command.build();
        add_pages(program, section(program), command, &mut pages)?;
    }
    pages.extend(WRITTEN.map(|(name, page)| (name.to_owned(), page.to_owned())));
    Ok(pages)
}

/// The page of a command, and those of its own commands, as git names them.
fn add_pages(
    name: &str,
    section: (&str, &str),
    command: Command,
    pages: &mut Vec<(String, String)>,
) -> io::Result<()> {
    for child in command.get_subcommands().filter(|child| child.get_name() != "help") {
        let name = format!("{name}-{}", child.get_name());
        add_pages(&name, section, child.clone(), pages)?;
    }
    let mut page = Vec::new();
    let title = name.to_uppercase();
    let (section, manual) = section;
    Man::new(command.disable_help_subcommand(true))
        .section(section)
        .title(title)
        .source(concat!("vlanswitchd ", env!("CARGO_PKG_VERSION")))
        .manual(manual)
        .render(&mut page)?;
    pages.push((format!("{name}.{section}"), String::from_utf8_lossy(&page).into_owned()));
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use clap::ValueEnum;

    /// Each command with the file name its page has.
    fn commands() -> Vec<(String, Command)> {
        fn walk(name: &str, command: &Command, found: &mut Vec<(String, Command)>) {
            for child in command.get_subcommands().filter(|child| child.get_name() != "help") {
                walk(&format!("{name}-{}", child.get_name()), child, found);
            }
            found.push((name.to_owned(), command.clone()));
        }
        let mut found = Vec::new();
        for (name, mut command) in
            [("vlanswitchctl", Arguments::command()), ("vlanswitchd", cli::Arguments::command())]
        {
            // Global options are then every command's.
            command.build();
            walk(name, &command, &mut found);
        }
        found
    }

    #[test]
    fn each_command_has_a_page_with_all_its_options() {
        let pages = pages().unwrap();
        let commands = commands();
        assert_eq!(pages.len(), commands.len() + WRITTEN.len());
        for (name, command) in commands {
            let program = name.split('-').next().unwrap();
            let file = format!("{name}.{}", section(program).0);
            let page = &pages.iter().find(|(page, _)| *page == file).unwrap().1;
            let page = page.replace("\\-", "-").replace("\\*(Aq", "'");
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                if let Some(long) = argument.get_long() {
                    assert!(page.contains(&format!("--{long}")), "{file}: no --{long}");
                }
                if let Some(short) = argument.get_short() {
                    assert!(page.contains(&format!("-{short}")), "{file}: no -{short}");
                }
                // clap words its own help differently on each kind of page.
                if argument.get_id() == "help" {
                    continue;
                }
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                assert!(!help.is_empty(), "{file}: {argument} has no help");
                let start: String = help.chars().take(20).collect();
                assert!(page.contains(&start), "{file}: no '{start}'");
            }
        }
    }

    #[test]
    fn completions_know_every_option_and_command() {
        for shell in Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(
                *shell,
                &mut Arguments::command(),
                "vlanswitchctl",
                &mut script,
            );
            let script = String::from_utf8(script).unwrap();
            for (name, command) in commands() {
                if !name.starts_with("vlanswitchctl") {
                    continue;
                }
                assert!(script.contains(command.get_name()), "{shell}: no {name}");
                for long in command.get_arguments().filter_map(|argument| argument.get_long()) {
                    assert!(script.contains(long), "{shell}: no --{long} of {name}");
                }
            }
        }
    }
}
