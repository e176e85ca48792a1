//! One module a command.

mod artifact;
mod attach;
mod backend;
mod cancel;
mod cancel_all;
mod completion;
mod delete;
mod get;
mod list;
mod logs;
mod parity;
mod run;
mod traffic;

use worker_client::{Client, ClientError};

use crate::{
    args::{BackendCommand, Cli, Command, FormatArgs},
    exit::Exit,
    failure::Failure,
    value::Format,
};

/// A connection, and what its errors are told with.
#[derive(Debug)]
struct Service {
    client: Client,
}

impl Service {
    async fn connect(endpoint: &str) -> Result<Self, Failure> {
        let builder = Client::builder(endpoint).user_agent(concat!("runnerctl/", env!("CARGO_PKG_VERSION")));
        let client = builder.connect().await.map_err(|e| Failure::client(&e, endpoint))?;
        Ok(Self { client })
    }

    fn failure(&self, error: &ClientError) -> Failure {
        Failure::client(error, self.client.endpoint())
    }
}

/// Does what the command line says.
pub(crate) async fn execute(cli: Cli) -> Result<Exit, Failure> {
    let outer = cli.format.format;
    let format = |own: FormatArgs| own.format.or(outer).unwrap_or_default();
    let endpoint = cli.endpoint.as_str();
    match cli.command {
        Command::Run(args) => {
            let format = args.format().or(outer).unwrap_or_default();
            run::execute(endpoint, *args, format)
                .await
                .map_err(|failure| failure.or_exit(Exit::INFRASTRUCTURE))
        }
        Command::Get(args) => {
            get::execute(&Service::connect(endpoint).await?, &args.run, format(args.format)).await
        }
        Command::List(args) => {
            let format = format(args.format);
            list::execute(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Logs(args) => {
            let format = format(args.format);
            logs::execute(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Cancel(args) => {
            let format = format(args.format);
            cancel::execute(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Delete(args) => {
            let format = format(args.format);
            delete::execute(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Attach(args) => {
            let format = format(args.format);
            attach::execute(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Artifact(command) => {
            artifact::execute(&Service::connect(endpoint).await?, command, format).await
        }
        Command::Backend(BackendCommand::List(args)) => {
            backend::execute(&Service::connect(endpoint).await?, format(args.format)).await
        }
        Command::Backend(BackendCommand::Health(args)) => {
            let format = format(args.format);
            backend::health(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Backend(BackendCommand::Drain(args)) => {
            let format = format(args.change.format);
            traffic::drain(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Backend(BackendCommand::Undrain(args)) => {
            let format = format(args.change.format);
            traffic::undrain(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Traffic(command) => {
            let format = |own: Option<Format>| own.or(outer).unwrap_or_default();
            traffic::execute(&Service::connect(endpoint).await?, command, format).await
        }
        Command::Audit(args) => {
            let format = format(args.format);
            traffic::audit(&Service::connect(endpoint).await?, args, format).await
        }
        Command::Parity(command) => {
            let format = |own: Option<Format>| own.or(outer).unwrap_or_default();
            parity::execute(&Service::connect(endpoint).await?, command, format).await
        }
        Command::Completion(args) => completion::execute(args.shell),
    }
}

/// Whether a person reads what goes to standard error.
fn is_watched() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}

/// Whether the result goes to a person.
fn is_table(format: Format) -> bool {
    match format {
        Format::Table => true,
        Format::Json => false,
    }
}
