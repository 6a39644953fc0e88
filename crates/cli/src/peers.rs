//! Flags that commands written for other servers carry and that depend on the model's or the device's: accepted with a note
//! where there is nothing to do, refused by name where there is and it is not built. None is ever ignored in silence.

use anyhow::{Result, bail};
use clap::Args;
use r1_core::Topology;

use crate::noted::NotedArgs;

/// Flags that do not do anything here yet, or never will.
#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools)] // each is a flag of somebody's command line
pub(crate) struct PeerArgs {
    /// Pipeline stages; only 1 is built.
    #[arg(
        long,
        alias = "pipeline-parallel-size",
        alias = "pp-size",
        value_name = "N",
        default_value_t = 1,
        hide = true
    )]
    pp: usize,
    #[arg(
        long,
        alias = "data-parallel-size",
        alias = "dp-size",
        value_name = "N",
        default_value_t = 1,
        hide = true
    )]
    dp: usize,
    #[arg(long, alias = "ep-size", value_name = "N", default_value_t = 1, hide = true)]
    ep: usize,
    #[arg(long, default_value_t = 1, hide = true)]
    nnodes: usize,
    #[arg(long, default_value_t = 0, hide = true)]
    node_rank: usize,
    #[arg(long, hide = true)]
    dist_init_addr: Option<String>,
    #[arg(long, hide = true)]
    enable_expert_parallel: bool,
    #[arg(long, hide = true)]
    enable_dp_attention: bool,
    /// Capture no steps. Nothing to do on a device that captures none.
    #[arg(long, hide = true)]
    enforce_eager: bool,
    /// As --enforce-eager.
    #[arg(long, hide = true)]
    disable_cuda_graph: bool,
    /// Most sequences of a decode step that is captured; larger ones run eagerly, and 0 captures none.
    #[arg(long, alias = "max-cudagraph-capture-size", value_name = "N", hide = true)]
    cuda_graph_max_bs: Option<usize>,
    /// Accepted: it is on unless --no-prefix-cache turns it off.
    #[arg(long, hide = true, conflicts_with = "no_prefix_cache")]
    enable_prefix_caching: bool,

    #[command(flatten)]
    noted: NotedArgs,
}

impl PeerArgs {
    /// Most sequences of a captured decode step.
    pub(crate) fn max_captured_seqs(&self) -> usize {
        if self.enforce_eager || self.disable_cuda_graph {
            0
        } else {
            self.cuda_graph_max_bs.unwrap_or(usize::MAX)
        }
    }

    /// Refuses what is asked for and not built; gives a note for each flag that has nothing to do.
    /// `captures` says whether the device captures steps.
    pub(crate) fn check(&self, tp: usize, captures: bool) -> Result<Vec<String>> {
        let Self { pp, dp, ep, .. } = *self;
        let topology = Topology { tp, pp, dp, ep }.validate()?;
        if self.nnodes == 0 {
            bail!("--nnodes is 0; it must be at least 1");
        }
        let one_worker = "this build runs one stage of one replica on one node; leave the flag out or give 1";
        let refusals = [
            (topology.pp > 1, "--pp", one_worker),
            (topology.dp > 1, "--dp", one_worker),
            (topology.ep > 1, "--ep", one_worker),
            (self.nnodes > 1, "--nnodes", one_worker),
            (self.node_rank > 0, "--node-rank", "this build runs on one node"),
            (self.dist_init_addr.is_some(), "--dist-init-addr", "this build runs on one node"),
            (self.enable_expert_parallel, "--enable-expert-parallel", one_worker),
            (self.enable_dp_attention, "--enable-dp-attention", one_worker),
        ];
        for (given, flag, way_out) in refusals {
            if given {
                bail!("{flag} is not supported yet: {way_out}");
            }
        }
        let notes = [
            (
                self.cuda_graph_max_bs.is_some() && !captures,
                "--cuda-graph-max-bs (--max-cudagraph-capture-size): nothing is captured on this device; steps always run \
                 eagerly",
            ),
            (
                self.disable_cuda_graph && !captures,
                "--disable-cuda-graph: nothing is captured on this device; steps always run eagerly",
            ),
            (
                self.enforce_eager && !captures,
                "--enforce-eager: nothing is captured on this device; steps always run eagerly",
            ),
            (self.enable_prefix_caching, "--enable-prefix-caching: the prefix cache is on by default"),
        ];
        let notes = notes.into_iter().filter(|(given, _)| *given).map(|(_, note)| note.to_owned());
        Ok(notes.chain(self.noted.check()?).collect())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::Cli;

    fn check(flags: &str) -> anyhow::Result<Vec<String>> {
        Cli::try_parse_from(format!("r1-serve {flags}").split_whitespace()).unwrap().serve.model.check()
    }

    #[test]
    fn capture_is_bounded_in_every_dialect() {
        let largest = |flags: &str| {
            let line = format!("r1-serve {flags}");
            Cli::try_parse_from(line.split_whitespace()).unwrap().serve.model.peers.max_captured_seqs()
        };
        assert_eq!(largest(""), usize::MAX);
        for flags in ["--enforce-eager", "--disable-cuda-graph", "--cuda-graph-max-bs 0"] {
            assert_eq!(largest(flags), 0, "{flags}");
        }
        assert_eq!(largest("--cuda-graph-max-bs 16"), 16);
        assert_eq!(largest("--max-cudagraph-capture-size=48"), 48);
        assert_eq!(largest("--cuda-graph-max-bs 16 --enforce-eager"), 0);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for flags in [
            "--dp 8",
            "--pipeline-parallel-size=2",
            "--enable-dp-attention",
            "--nnodes 2",
            "--uds x",
            "--lora-modules a=b c=d",
            "--ssl-keyfile-password x",
        ] {
            let error = check(flags).unwrap_err().to_string();
            let flag = if flags.starts_with("--pipe") { "--pp" } else { flags.split(' ').next().unwrap() };
            assert!(error.contains(flag), "{flags}: {error}");
        }
    }

    #[test]
    fn what_has_nothing_to_do_is_noted() {
        assert!(check("--tp 1 --nnodes 1 --node-rank 0").unwrap().is_empty());
        assert!(check("--pp 0").unwrap_err().to_string().contains("pp is 0"));
        let notes =
            check("--trust-remote-code --enable-torch-compile --torch-compile-max-bs 8 --enforce-eager")
                .unwrap();
        assert_eq!(notes.len(), 4);
        for flag in ["--disable-cuda-graph", "--cuda-graph-max-bs 16", "--max-cudagraph-capture-size 16"] {
            let notes = check(flag).unwrap();
            assert!(
                notes.len() == 1 && notes[0].contains(flag.split(' ').next().unwrap()),
                "{flag}: {notes:?}"
            );
            assert!(check(&format!("{flag} --device cuda")).unwrap().is_empty(), "{flag}");
        }
        assert_eq!(check("--enable-prefix-caching --tp 2").unwrap().len(), 1);
    }
}
